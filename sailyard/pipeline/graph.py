"""What a stage declares, and the checked graph that stages form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType

GROUPS = (
    "curation",
    "bootstrap",
    "alignment",
    "pretraining",
    "post_training",
    "evaluation",
    "deployment",
)
"""The parts of the pipeline, in reading order; a stage's group is the first part of its name."""

ALWAYS_READABLE = ("seed", "name")
"""Recipe fields every stage may read. Only the seed is part of every cache key."""


class UnknownStage(ValueError):
    """A stage name that the pipeline does not have."""


class PipelineError(ValueError):
    """The declared graph does not hold together."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One step: (recipe sections, input artifacts) -> output artifacts.

    Attributes:
        name: "group.step".
        entry: "package.module:function", called with a StageContext in the stage's process.
        version: Of the stage's code; part of the cache key.
        inputs: Input name -> "stage/output" that produces it.
        outputs: Names of the artifacts the stage must fill.
        sections: Dotted recipe paths the stage may read, and its cache key covers.
        doc: One line for people.
        needs_torch: The entry imports torch.
        resumable: The entry keeps checkpoints and watches ``stop_requested``; others are
            interrupted at once when asked to stop.
        distributed: The entry may run as several ranks at once; of other stages rank 0 runs alone.
        spreads: The entry's map step can be spread over a Ray cluster (``curation.spread``).
        gpus: Devices wanted on a cluster; 0 runs on the CPU.
        restore: "package.module:function", called when a finished result is reused, by the
            stages whose effect reaches outside their artifacts.
    """

    name: str
    entry: str
    version: int
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()
    doc: str = ""
    needs_torch: bool = False
    resumable: bool = False
    distributed: bool = False
    spreads: bool = False
    gpus: int = 0
    restore: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", MappingProxyType(dict(self.inputs)))

    @property
    def group(self) -> str:
        """The part of the pipeline the stage belongs to."""
        return self.name.split(".", 1)[0]


class Pipeline:
    """A checked, topologically ordered graph of stages."""

    def __init__(self, stages: Iterable[Stage]) -> None:
        """Order the stages.

        Raises:
            PipelineError: Two stages of one name, an input nobody produces, or a cycle.
        """
        declared = list(stages)
        self._by_name = {stage.name: stage for stage in declared}
        if len(self._by_name) != len(declared):
            names = [stage.name for stage in declared]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise PipelineError(f"declared more than once: {', '.join(twice)}")
        self._upstream = {stage.name: self._producers(stage) for stage in declared}
        self.stages = tuple(self._order(declared))
        """Every stage, producers before consumers."""
        self._downstream = {
            name: tuple(s.name for s in self.stages if name in self._upstream[s.name])
            for name in self._by_name
        }

    def _producers(self, stage: Stage) -> tuple[str, ...]:
        producers: dict[str, None] = {}
        for name, source in stage.inputs.items():
            producer, _, output = source.partition("/")
            known = self._by_name.get(producer)
            if known is None or output not in known.outputs:
                raise PipelineError(
                    f"input {name!r} of stage {stage.name!r} is {source!r}, which no stage produces"
                )
            producers[producer] = None
        return tuple(producers)

    def _order(self, declared: list[Stage]) -> list[Stage]:
        ordered: list[Stage] = []
        done: set[str] = set()
        waiting = declared
        while waiting:
            ready = [s for s in waiting if done.issuperset(self._upstream[s.name])]
            if not ready:
                names = ", ".join(s.name for s in waiting)
                raise PipelineError(f"these stages wait for each other: {names}")
            # One at a time keeps the declared reading order wherever the edges allow it.
            ordered.append(ready[0])
            done.add(ready[0].name)
            waiting = [s for s in waiting if s is not ready[0]]
        return ordered

    @property
    def groups(self) -> dict[str, tuple[Stage, ...]]:
        """Group name -> its stages, in order; groups without a stage are left out."""
        grouped = {group: tuple(s for s in self.stages if s.group == group) for group in GROUPS}
        return {group: stages for group, stages in grouped.items() if stages}

    def stage(self, name: str) -> Stage:
        """The stage of that name.

        Raises:
            UnknownStage: There is none; the message names the nearest.
        """
        try:
            return self._by_name[name]
        except KeyError:
            near = get_close_matches(name, self._by_name, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UnknownStage(f"there is no stage {name!r}{hint}") from None

    def upstream(self, name: str) -> tuple[str, ...]:
        """Names of the stages whose outputs the stage reads directly."""
        return self._upstream[self.stage(name).name]

    def downstream(self, name: str) -> tuple[str, ...]:
        """Names of the stages that read the stage's outputs directly."""
        return self._downstream[self.stage(name).name]

    def ancestors(self, name: str) -> frozenset[str]:
        """Names of every stage that the stage depends on, near or far."""
        return self._reach(name, self._upstream)

    def descendants(self, name: str) -> frozenset[str]:
        """Names of every stage that depends on the stage, near or far."""
        return self._reach(name, self._downstream)

    def _reach(self, name: str, edges: Mapping[str, tuple[str, ...]]) -> frozenset[str]:
        found: set[str] = set()
        frontier = list(edges[self.stage(name).name])
        while frontier:
            current = frontier.pop()
            if current not in found:
                found.add(current)
                frontier.extend(edges[current])
        return frozenset(found)
