"""Pipeline runs: made here, read by every process that works on one.

The run's object in the store is its truth, so that a pod needs the store and a run id and
nothing else; the lineage database holds a copy for people to ask.
"""

from __future__ import annotations

import hashlib
import importlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sailyard.pipeline import Pipeline, build_pipeline
from sailyard.stage.results import (
    Results,
    StageResult,
    read_result,
    run_key,
    write_run_copy,
)
from sailyard.yard import Yard

if TYPE_CHECKING:
    from sailyard.lineage import StageRunInfo
    from sailyard.recipe import Recipe

_CHUNK = 1 << 20


class RunError(ValueError):
    """A run that is not there or cannot be made; the message says what to do."""


@dataclass(frozen=True)
class Run:
    """One execution of the pipeline.

    Attributes:
        id: Sorts by time and reads well: "20261123-1405-tiny-ab12", in UTC.
        recipe: Resolved.
        overrides: As given, for people.
        start_from: Stage to start at, or "". Stages that do not depend on it are only reused.
        force: Stages that would be started are run even if finished results exist.
        created_at: Aware.
    """

    id: str
    recipe: Recipe
    overrides: tuple[str, ...]
    start_from: str
    force: bool
    created_at: datetime

    @cached_property
    def pipeline(self) -> Pipeline:
        """The recipe's graph."""
        return build_pipeline(self.recipe)

    def started_stages(self) -> frozenset[str]:
        """Stages the run may start: all, or ``start_from`` and everything after it."""
        if not self.start_from:
            return frozenset(stage.name for stage in self.pipeline.stages)
        return self.pipeline.descendants(self.start_from) | {self.start_from}

    def forced(self) -> frozenset[str]:
        """Stages whose results of other runs the run does not reuse."""
        return self.started_stages() if self.force else frozenset()

    def check_may_run(self, stage_name: str) -> None:
        """RunError when the run starts later in the graph and so only reuses the stage."""
        if stage_name not in self.started_stages():
            raise RunError(
                f"run {self.id} starts at {self.start_from!r}, and {stage_name!r} before it has "
                "no finished result for this recipe; run without --from"
            )


@dataclass(frozen=True, slots=True)
class StageState:
    """Where a stage of a run is.

    Attributes:
        stage: Its name.
        status: pending | running | finished | failed | stopped | lost.
        cached: Finished by reuse.
        info: Its lineage row; None while pending.
    """

    stage: str
    group: str
    status: str
    cached: bool
    info: StageRunInfo | None


def create_run(
    recipe: str | Recipe,
    overrides: Sequence[str] = (),
    *,
    start_from: str | None = None,
    force: bool = False,
    data: str | Path | None = None,
    yard: Yard | None = None,
    on_hash: Callable[[int, int], None] | None = None,
) -> str:
    """Resolve a recipe and open a run for it; returns the run's id.

    Args:
        recipe: Preset name, path of a YAML file, or a recipe.
        overrides: "a.b.c=value", later ones win; not with a recipe object.
        start_from: Stage to start at.
        force: Run again what is finished.
        data: Folder or file of the user's own data, mixed in at ingestion.
        yard: By default the environment's.
        on_hash: Called with (files done, files in all) while ``data`` is being read.

    Raises:
        RecipeError: The recipe is not right.
        UnknownStage: There is no such stage to start from.
        RunError: The data are not there.
    """
    from sailyard.lineage import records

    yard = yard or Yard()
    resolved = _resolve(recipe, overrides, data, on_hash)
    pipeline = build_pipeline(resolved)
    if start_from:
        pipeline.stage(start_from)
    created_at = datetime.now(UTC)
    body: dict[str, Any] = {
        "recipe": resolved.model_dump(mode="json"),
        "overrides": list(overrides),
        "start_from": start_from or "",
        "force": force,
        "created_at": created_at.isoformat(),
    }
    run_id = _claim_id(yard, resolved.name, created_at, body)
    records.add_run(
        yard.database,
        run_id,
        recipe_name=resolved.name,
        recipe=body["recipe"],
        overrides=overrides,
        start_from=start_from or "",
        force=force,
        num_stages=len(pipeline.stages),
        created_at=created_at,
    )
    return run_id


def load_run(run_id: str, yard: Yard | None = None) -> Run:
    """A run by its id.

    Raises:
        RunError: There is no such run.
    """
    from sailyard.recipe import build_recipe

    yard = yard or Yard()
    key = f"runs/{run_id}/run.json"
    if "/" in run_id or not run_id or not yard.store.exists(key):
        raise RunError(f"there is no run {run_id!r} in {yard.settings.store}")
    body = yard.store.read_json(key)
    return Run(
        id=run_id,
        recipe=build_recipe(body["recipe"], where=f"of run {run_id}"),
        overrides=tuple(body["overrides"]),
        start_from=body["start_from"],
        force=body["force"],
        created_at=datetime.fromisoformat(body["created_at"]),
    )


def cached_result(run_id: str, stage_name: str, yard: Yard | None = None) -> StageResult | None:
    """The finished result that the run can use for a stage, or None. Writes nothing."""
    yard = yard or Yard()
    return results_of(yard, load_run(run_id, yard)).find(stage_name)


def reuse_result(run_id: str, stage_name: str, yard: Yard | None = None) -> StageResult | None:
    """As ``cached_result``, and enters the reuse into the run and into lineage.

    A launcher calls this first: a stage that is finished needs no process.
    """
    yard = yard or Yard()
    run = load_run(run_id, yard)
    return reuse(yard, run, stage_name, results_of(yard, run))


def stage_result(run_id: str, stage_name: str, yard: Yard | None = None) -> StageResult | None:
    """What became of a stage in a run, whatever that is; None before it has started."""
    yard = yard or Yard()
    return read_result(yard.store, run_key(run_id, stage_name))


def stage_state(run_id: str, yard: Yard | None = None) -> list[StageState]:
    """Every stage of a run's pipeline, in order, and where it is."""
    from sailyard.lineage import queries, records

    yard = yard or Yard()
    run = load_run(run_id, yard)
    records.mark_lost(yard.database)
    rows = {row.stage: row for row in queries.stage_runs(yard.database, run_id)}
    states = []
    for stage in run.pipeline.stages:
        row = rows.get(stage.name)
        status, cached = (row.status, row.cached) if row else ("pending", False)
        states.append(StageState(stage.name, stage.group, status, cached, row))
    return states


def stage_log(
    run_id: str, stage_name: str, max_bytes: int = 1 << 20, yard: Yard | None = None
) -> str:
    """The end of a stage's log, at most ``max_bytes`` of it; "" when there is none."""
    yard = yard or Yard()
    key = log_key(run_id, stage_name)
    if not yard.store.exists(key):
        return ""
    return yard.store.get(key)[-max_bytes:].decode(errors="replace")


def log_key(run_id: str, stage_name: str) -> str:
    """Where a stage's log lies in the store."""
    return f"runs/{run_id}/logs/{stage_name}.log"


def results_of(yard: Yard, run: Run) -> Results:
    """The results the run can see."""
    return Results(
        yard.store, yard.artifacts, run.pipeline, run.recipe, run.id, forced=run.forced()
    )


def reuse(yard: Yard, run: Run, stage_name: str, results: Results) -> StageResult | None:
    """Enter a finished result into the run, if there is one."""
    from sailyard.lineage import ArtifactInfo, records

    result = results.find(stage_name)
    if result is None:
        return None
    stage = run.pipeline.stage(stage_name)
    if stage.restore:  # what it did outside its artifacts
        module_name, _, function_name = stage.restore.partition(":")
        getattr(importlib.import_module(module_name), function_name)(yard, run, result)
    write_run_copy(yard.store, run.id, result)
    outputs = {
        name: ArtifactInfo.of(yard.artifacts.get(digest)) for name, digest in result.outputs.items()
    }
    records.record_cached(
        yard.database,
        run.id,
        stage_name,
        result.cache_key,
        result.inputs,
        outputs,
        source_run_id=result.run_id,
        computed_seconds=result.seconds,
        summary=result.metrics,
    )
    return result


def was_attempted(yard: Yard, run_id: str, stage_name: str) -> bool:
    """Whether the run has started the stage before."""
    return read_result(yard.store, run_key(run_id, stage_name)) is not None


def data_digest(path: Path, on_hash: Callable[[int, int], None] | None = None) -> str:
    """sha256 over the names and contents of the files below a path.

    Raises:
        RunError: There is nothing at the path.
    """
    if path.is_file():
        files = [path]
    else:
        files = sorted(p for p in path.rglob("*") if p.is_file())
    if not files:
        raise RunError(f"there are no data at {path}; name a folder with images, or a file")
    digest = hashlib.sha256()
    for done, file in enumerate(files):
        if on_hash is not None:
            on_hash(done, len(files))
        name = file.relative_to(path).as_posix() if file != path else file.name
        inner = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                inner.update(chunk)
        digest.update(name.encode(errors="surrogateescape") + b"\0" + inner.digest())
    return digest.hexdigest()


def _resolve(
    recipe: str | Recipe,
    overrides: Sequence[str],
    data: str | Path | None,
    on_hash: Callable[[int, int], None] | None,
) -> Recipe:
    from sailyard.recipe import build_recipe, load_recipe

    resolved = load_recipe(recipe, overrides) if isinstance(recipe, str) else recipe
    path = str(data) if data else resolved.data.path
    if not path:
        return resolved
    folder = Path(path).expanduser().absolute()
    body = resolved.model_dump(mode="json")
    body["data"] |= {"path": str(folder), "digest": data_digest(folder, on_hash)}
    return build_recipe(body, where=resolved.name)


def _claim_id(yard: Yard, name: str, created_at: datetime, body: Mapping[str, Any]) -> str:
    """A run id nobody has, taken by writing the run's object."""
    safe = "".join(c if c.isalnum() or c in "._-" else "-" for c in name)[:40]
    while True:
        run_id = f"{created_at:%Y%m%d-%H%M}-{safe}-{secrets.token_hex(2)}"
        if yard.store.write_json(f"runs/{run_id}/run.json", dict(body), if_absent=True):
            return run_id
