"""``sailyard doctor``: is everything there, and if not, what to do."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from sailyard.cli.finding import Finding
from sailyard.cli.output import console, print_json

if TYPE_CHECKING:
    from sailyard.yard import Yard

# A tiny run with its checkpoints takes about one; mid-run is the worst time to find a disk full.
WANTED_DISK_GB = 5.0

EXTRAS = {
    "train": ("torch", "transformers", "safetensors", "tokenizers", "sklearn", "skimage", "av"),
    "serve": ("torch", "transformers", "fastapi", "uvicorn"),
    "airflow": ("airflow",),
    "dashboard": ("streamlit", "altair"),
}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Look at the Kubernetes cluster too: rights, Jobs.")
    ] = False,
    remove_leftovers: Annotated[
        bool,
        typer.Option(
            "--remove-leftovers",
            help="With --cluster: delete stages' Jobs that have ended or are not needed any more.",
        ),
    ] = False,
) -> None:
    """Check store, database, disk and Python packages; exit status 1 if something is broken."""
    from sailyard.yard import Yard

    yard = Yard()
    findings = list(_examine(yard))
    if cluster or remove_leftovers:
        from sailyard.cli.cluster import examine_cluster

        findings += examine_cluster(yard, remove_leftovers)
    broken = any(finding.level == "problem" for finding in findings)
    if as_json:
        print_json({"ok": not broken, "findings": findings})
    else:
        marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "problem": "[bold red]problem[/]"}
        for finding in findings:
            console.print(f"{marks[finding.level]:>8}  {finding.check}: ", end="")
            console.print(finding.text, markup=False, highlight=False, soft_wrap=True)
            if finding.way_out:
                console.print(f"         -> {finding.way_out}", markup=False, soft_wrap=True)
    if broken:
        raise typer.Exit(1)


def _examine(yard: Yard) -> Iterator[Finding]:
    checks: tuple[Callable[[Yard], Finding], ...] = (_python, _home, _disk, _store, _database)
    for check in checks:
        try:
            yield check(yard)
        except Exception as error:  # a check that breaks is a finding, not the end
            text = yard.redact(" ".join(str(error).split()) or type(error).__name__)
            yield Finding(check.__name__.strip("_"), "problem", text, WAYS_OUT[check.__name__])
    for extra, modules in EXTRAS.items():
        yield _packages(extra, modules)


WAYS_OUT = {
    "_python": "use Python 3.11 or 3.12",
    "_home": "point SAILYARD_HOME at a folder you may write to",
    "_disk": "free some space, or point SAILYARD_HOME elsewhere",
    "_store": "check SAILYARD_STORE, and for S3 SAILYARD_S3_ENDPOINT, the two keys and the bucket",
    "_database": "check SAILYARD_DATABASE_URL, and that the database runs",
}


def _python(_yard: Yard) -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    right = (3, 11) <= sys.version_info[:2] < (3, 13)
    return _finding("python", right, version, WAYS_OUT["_python"])


def _home(yard: Yard) -> Finding:
    home = yard.folder()
    return _finding("home", os.access(home, os.W_OK), str(home), WAYS_OUT["_home"])


def _disk(yard: Yard) -> Finding:
    free = shutil.disk_usage(yard.folder()).free / 1e9
    text = f"{free:.1f} GB free, {WANTED_DISK_GB:g} GB wanted"
    return _finding("disk", free >= WANTED_DISK_GB, text, WAYS_OUT["_disk"])


def _store(yard: Yard) -> Finding:
    """Writes, reads and removes a small object; whatever fails, fails here and not in a run."""
    key = f"doctor/{uuid.uuid4().hex}"
    wrote = yard.store.put(key, b"hello", if_absent=True)
    again = yard.store.put(key, b"other", if_absent=True)
    kept = yard.store.get(key) == b"hello"
    yard.store.delete(key)
    text = yard.redact(yard.settings.store)
    if not wrote or again or not kept:
        return Finding(
            "store",
            "problem",
            f"{text} takes a conditional write twice",
            "use a server that honours If-None-Match",
        )
    return Finding("store", "ok", text)


def _database(yard: Yard) -> Finding:
    from sailyard.lineage import queries

    runs = len(queries.list_runs(yard.database, limit=1000))
    return Finding("database", "ok", f"{yard.database.name}, {runs} runs")


def _packages(extra: str, modules: tuple[str, ...]) -> Finding:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if not missing:
        return Finding(f"packages for {extra}", "ok", "all there")
    text = f"missing: {', '.join(missing)}"
    return Finding(f"packages for {extra}", "note", text, f"pip install 'sailyard[{extra}]'")


def _finding(check: str, right: bool, text: str, way_out: str) -> Finding:
    return Finding(check, "ok" if right else "problem", text, "" if right else way_out)
