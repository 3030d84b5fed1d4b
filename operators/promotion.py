"""What the promotion DAG does: show a model version to a human, then move the alias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sailyard.registry import ModelVersion, RegistryError
from sailyard.yard import Yard


def review(version: str, alias: str) -> dict[str, str]:
    """What a human decides on.

    Args:
        version: "name:number", "name" (its newest), a digest prefix, or "" for the newest of all.
        alias: That would be moved.

    Returns:
        "version" -> the exact "name:number"; "text" -> Markdown with its figures beside those of
        the version that the alias points at now.

    Raises:
        RegistryError: There is no such version.
    """
    registry = Yard().registry
    if version:
        candidate = registry.version(version)
    else:
        newest = registry.versions(limit=1)
        if not newest:
            raise RegistryError("no model version is registered; run the sail_vl2 DAG first")
        candidate = newest[0]
    return {
        "version": candidate.ref,
        "text": _text(candidate, registry.current(alias), alias),
    }


def promote(version: str, alias: str, actor: str, reason: str) -> str:
    """Point the alias at the version; returns its "name:number"."""
    return Yard().registry.promote(alias, version, actor=actor, reason=reason).ref


def _text(candidate: ModelVersion, current: ModelVersion | None, alias: str) -> str:
    now = f"`{alias}` points at **{current.ref}** now." if current else f"`{alias}` is not set yet."
    lines = [
        f"Promote **{candidate.ref}** to `{alias}`? {now}",
        "",
        f"Registered {candidate.created_at:%Y-%m-%d %H:%M} UTC by run `{candidate.run_id}`, "
        f"checkpoint `{candidate.checkpoint[:12]}`.",
    ]
    if candidate.metrics:
        lines += ["", *_metrics_table(candidate, current)]
    return "\n".join(lines)


def _metrics_table(candidate: ModelVersion, current: ModelVersion | None) -> list[str]:
    before: Mapping[str, Any] = current.metrics if current else {}
    rows = ["| metric | this version | now |", "|---|---|---|"]
    for name, value in candidate.metrics.items():
        rows.append(f"| {name} | {_figure(value)} | {_figure(before.get(name, ''))} |")
    return rows


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
