"""Finished results in the store, and how a run finds the ones it needs.

``stages/<cache key>/result.json`` is what a stage made, for whoever has the same key;
``runs/<run>/stages/<stage>/result.json`` is what became of the stage in one run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from sailyard.pipeline import Pipeline, Stage
from sailyard.stage.errors import StageError
from sailyard.stage.keys import cache_key

if TYPE_CHECKING:
    from sailyard.artifacts import ArtifactStore, ObjectStore
    from sailyard.recipe import Recipe


@dataclass(frozen=True, slots=True)
class StageResult:
    """What became of a stage.

    Attributes:
        stage: Its name.
        cache_key: Identity of the result.
        status: running | finished | failed | stopped | lost.
        run_id: The run that made it.
        inputs: Input name -> digest.
        outputs: Output name -> digest; empty unless finished.
        metrics: The stage's summary.
        seconds: Wall time of the attempt that ended so.
        cached: Reused from another run; in a run's own copy only.
        error: One line, when it failed.
    """

    stage: str
    cache_key: str
    status: str
    run_id: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    cached: bool = False
    error: str = ""

    @property
    def finished(self) -> bool:
        """Whether the outputs are there."""
        return self.status == "finished"

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StageResult:
        """From ``to_json``; fields of a newer version are passed over."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in data.items() if name in known})


class NotReady(StageError):
    """A stage was asked for before the stages it reads from have finished."""


class Results:
    """The results one run can see.

    A stage is looked up in this order: the run's own finished result; else, unless the run
    forces the stage, a finished result of any run under the same cache key.
    """

    def __init__(
        self,
        store: ObjectStore,
        artifacts: ArtifactStore,
        pipeline: Pipeline,
        recipe: Recipe,
        run_id: str,
        forced: frozenset[str] = frozenset(),
    ) -> None:
        """Args: forced: Stages whose results of other runs are not good enough."""
        self._store = store
        self._artifacts = artifacts
        self._pipeline = pipeline
        self._recipe = recipe
        self._run_id = run_id
        self._forced = forced
        self._found: dict[str, StageResult] = {}

    def find(self, stage_name: str) -> StageResult | None:
        """The finished result of a stage that this run can use, or None.

        The run's own result counts only while its cache key still holds: new code, or an input
        that was made again and came out different, asks for a new one.
        """
        if stage_name in self._found:
            return self._found[stage_name]
        try:
            key = self.key(self._pipeline.stage(stage_name))
        except NotReady:
            return None
        result = self._own(stage_name)
        if result is not None and result.cache_key != key:
            result = None
        if result is None and stage_name not in self._forced:
            found = self._usable(read_result(self._store, global_key(key)))
            # Who made it decides: a run that was killed just before it noted its own result
            # finds it here, and has not reused anything.
            result = found and _with(found, cached=found.run_id != self._run_id)
        if result is not None:
            self._found[stage_name] = result
        return result

    def input_digests(self, stage: Stage) -> dict[str, str]:
        """Input name -> digest of the artifact that the stage reads in this run.

        Raises:
            NotReady: An input's producer has no finished result.
        """
        digests = {}
        for name, source in stage.inputs.items():
            producer, _, output = source.partition("/")
            # Stages run in order, so a producer's own key was held against its inputs before.
            result = self._found.get(producer) or self._own(producer) or self.find(producer)
            if result is None:
                raise NotReady(
                    f"stage {stage.name!r} reads {source!r}, and {producer!r} has no finished "
                    f"result in run {self._run_id!r}; run that stage first"
                )
            digests[name] = result.outputs[output]
        return digests

    def key(self, stage: Stage) -> str:
        """The stage's cache key in this run; NotReady as for ``input_digests``."""
        return cache_key(stage, self._recipe, self.input_digests(stage))

    def forget(self, stage_name: str) -> None:
        """Look a stage up afresh the next time."""
        self._found.pop(stage_name, None)

    def _own(self, stage_name: str) -> StageResult | None:
        return self._usable(read_result(self._store, run_key(self._run_id, stage_name)))

    def _usable(self, result: StageResult | None) -> StageResult | None:
        """The result, if it is finished and its artifacts still exist."""
        if result is None or not result.finished:
            return None
        declared = self._pipeline.stage(result.stage).outputs
        from sailyard.artifacts import ArtifactNotFound

        try:
            for output in declared:
                self._artifacts.get(result.outputs[output])
        except (ArtifactNotFound, KeyError):
            return None
        return result


def global_key(key: str) -> str:
    """Where the result of a cache key lies in the store."""
    return f"stages/{key}/result.json"


def run_key(run_id: str, stage_name: str) -> str:
    """Where a run's copy lies in the store."""
    return f"runs/{run_id}/stages/{stage_name}/result.json"


def read_result(store: ObjectStore, key: str) -> StageResult | None:
    """A result object, or None when it is not there."""
    if not store.exists(key):
        return None
    return StageResult.from_json(store.read_json(key))


def write_result(store: ObjectStore, key: str, result: StageResult) -> None:
    """Write a result object; objects appear whole or not at all."""
    store.write_json(key, result.to_json())


def write_run_copy(
    store: ObjectStore, run_id: str, result: StageResult, **changes: Any
) -> StageResult:
    """Note in a run what became of a stage; returns the copy."""
    copy = _with(result, **changes)
    write_result(store, run_key(run_id, result.stage), copy)
    return copy


def _with(result: StageResult, **changes: Any) -> StageResult:
    return StageResult(**(result.to_json() | changes))
