"""Launchers: where the process of a stage runs."""

from __future__ import annotations

from operators.launchers.base import JobState, Launcher, StageJob
from operators.launchers.local import LocalLauncher

LAUNCHERS = ("local", "kubernetes")
"""Names that ``make_launcher`` knows."""

__all__ = ["LAUNCHERS", "JobState", "Launcher", "LocalLauncher", "StageJob", "make_launcher"]


def make_launcher(name: str) -> Launcher:
    """The launcher of that name.

    Raises:
        ValueError: There is none; the message lists those there are.
    """
    if name == "local":
        return LocalLauncher()
    if name == "kubernetes":
        # Its client takes half a second to import, and DAG files are parsed all the time.
        from operators.launchers.kubernetes import KubernetesLauncher

        return KubernetesLauncher()
    raise ValueError(f"there is no launcher {name!r}; choose from: {', '.join(LAUNCHERS)}")
