"""What an entry is given: its sections, inputs and outputs, and where to report."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sailyard.pipeline import Stage, build_pipeline
from sailyard.stage.checkpoints import Checkpoints
from sailyard.stage.errors import StageError
from sailyard.stage.keys import cache_key, may_read, resolve_section, stage_seed
from sailyard.stage.ranks import Rank
from sailyard.stage.recorder import MemoryRecorder, Recorder

if TYPE_CHECKING:
    from sailyard.artifacts import ArtifactStore
    from sailyard.recipe import Recipe
    from sailyard.registry import Registry
    from sailyard.samples import OpenFile
    from sailyard.settings import Settings


class StageContext:
    """The only argument of an entry.

    Attributes:
        stage: The declaration; ``stage.sections[0]`` is the stage's own recipe section.
        stage_name: Its name.
        run_id: The run this execution belongs to.
        cache_key: Identity of the result being made.
        seed: Derived from the recipe's seed and the stage's name.
        checkpoints: Save and find checkpoints of this very result.
        recorder: Receives metric points and progress (a MemoryRecorder in tests).
        summary_values: What ``summary`` collected so far.
        output_metas: What ``output_meta`` collected so far.
    """

    def __init__(
        self,
        *,
        stage: Stage,
        recipe: Recipe,
        run_id: str,
        key: str,
        input_digests: Mapping[str, str],
        fetch_input: Callable[[str], Path],
        stream_input: Callable[[str], OpenFile],
        work: Path,
        checkpoints: Checkpoints,
        recorder: Recorder,
        open_registry: Callable[[], Registry],
        open_artifacts: Callable[[], ArtifactStore],
    ) -> None:
        self.stage = stage
        self.stage_name = stage.name
        self.run_id = run_id
        self.cache_key = key
        self.seed = stage_seed(recipe.seed, stage.name)
        self.checkpoints = checkpoints
        self.recorder = recorder
        self.summary_values: dict[str, Any] = {}
        self.output_metas: dict[str, dict[str, Any]] = {}
        self._recipe = recipe
        self._input_digests = dict(input_digests)
        self._fetch_input = fetch_input
        self._stream_input = stream_input
        self._fetched: dict[str, Path] = {}
        self._work = work
        self._stop = threading.Event()
        self._open_registry = open_registry
        self._open_artifacts = open_artifacts

    @classmethod
    def local_context(
        cls,
        tmp_path: Path,
        recipe: Recipe,
        stage_name: str,
        inputs: Mapping[str, Path],
        settings: Settings | None = None,
    ) -> StageContext:
        """A context for running one entry by hand, without a run or a database.

        Args:
            tmp_path: Folder for scratch space, outputs, checkpoints and a small registry.
            recipe: Any recipe.
            stage_name: A stage of the recipe's pipeline.
            inputs: Input name -> directory; all that the entry reads must be there. What it
                streams is published in the store first.
            settings: Name another store than a folder in `tmp_path`.
        """
        # Here, not above: an entry run by hand is the only one that makes its own store.
        from sailyard.artifacts import open_artifacts
        from sailyard.lineage import Database
        from sailyard.registry import Registry
        from sailyard.settings import Settings

        stage = build_pipeline(recipe).stage(stage_name)
        unknown = sorted(set(inputs) - set(stage.inputs))
        if unknown:
            raise StageError(f"stage {stage_name!r} has no input {unknown[0]!r}")
        here = Settings(home=tmp_path, store=f"file://{Path(tmp_path).absolute()}/store")
        artifacts = open_artifacts(settings or here)
        digests = {name: _directory_digest(inputs.get(name)) for name in stage.inputs}
        key = cache_key(stage, recipe, digests)
        rank = Rank.from_environment().number
        work = tmp_path / "work" / (f"{stage_name}.rank{rank}" if rank else stage_name)
        return cls(
            stage=stage,
            recipe=recipe,
            run_id="local",
            key=key,
            input_digests=digests,
            fetch_input=lambda name: inputs[name],
            stream_input=lambda name: artifacts.stream(
                artifacts.publish(inputs[name], "input").digest
            ),
            work=work,
            checkpoints=Checkpoints(artifacts.store, key, work / "resume"),
            recorder=MemoryRecorder(),
            open_registry=lambda: Registry(Database(f"sqlite:///{tmp_path}/lineage.db")),
            open_artifacts=lambda: artifacts,
        )

    # --- what the stage reads ---------------------------------------------------------------------

    def section(self, path: str) -> Any:
        """The recipe's value at a dotted path.

        Raises:
            StageError: The stage did not declare the section, so its cache key would not
                notice a change in it.
        """
        if not may_read(self.stage, path):
            raise StageError(
                f"stage {self.stage_name!r} did not declare the recipe section {path!r}; it may "
                f"read {', '.join(self.stage.sections)}. Declare it in sailyard/pipeline."
            )
        return resolve_section(self._recipe, path)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the declared inputs, in order."""
        return tuple(self.stage.inputs)

    def input(self, name: str) -> Path:
        """A read-only local directory with the input's verified files.

        Raises:
            StageError: The stage has no such input.
        """
        self._require_input(name)
        if name not in self._fetched:
            try:
                self._fetched[name] = self._fetch_input(name)
            except KeyError:
                raise StageError(f"input {name!r} of {self.stage_name!r} was not given") from None
        return self._fetched[name]

    def stream(self, name: str) -> OpenFile:
        """Opens the files of an input by name, each brought and verified when it is opened: for a
        dataset that need not be on this machine as a whole.

        Raises:
            StageError: The stage has no such input.
        """
        self._require_input(name)
        try:
            return self._stream_input(name)
        except KeyError:
            raise StageError(f"input {name!r} of {self.stage_name!r} was not given") from None

    def input_digest(self, name: str) -> str:
        """Digest of the input's artifact."""
        self._require_input(name)
        return self._input_digests[name]

    def _require_input(self, name: str) -> None:
        if name not in self.stage.inputs:
            raise StageError(
                f"stage {self.stage_name!r} has no input {name!r}; "
                f"it has {', '.join(self.stage.inputs) or 'none'}"
            )

    # --- what the stage makes ---------------------------------------------------------------------

    def output(self, name: str) -> Path:
        """The directory to fill for an output; published when the entry returns.

        Raises:
            StageError: The stage has no such output.
        """
        self._require_output(name)
        path = self._work / "out" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def output_meta(self, name: str, meta: Mapping[str, Any]) -> None:
        """Facts to keep in the output artifact's manifest; they are part of its digest."""
        self._require_output(name)
        self.output_metas.setdefault(name, {}).update(jsonable(meta, f"meta of {name!r}"))

    def _require_output(self, name: str) -> None:
        if name not in self.stage.outputs:
            raise StageError(
                f"stage {self.stage_name!r} has no output {name!r}; "
                f"it has {', '.join(self.stage.outputs) or 'none'}"
            )

    def scratch(self) -> Path:
        """A directory for anything temporary; gone when the stage ends."""
        path = self._work / "scratch"
        path.mkdir(parents=True, exist_ok=True)
        return path

    # --- what the stage reports -------------------------------------------------------------------

    def metric(self, step: int, **values: float) -> None:
        """One point of each named series. Written in batches; a step written again replaces."""
        self.recorder.metric(int(step), {name: float(value) for name, value in values.items()})

    def summary(self, **values: Any) -> None:
        """Final figures, JSON-able and possibly nested; a key given again replaces.

        Raises:
            StageError: A value is not JSON-able.
        """
        for name, value in values.items():
            self.summary_values[name] = jsonable(value, name)

    def progress(self, done: int, total: int, note: str = "") -> None:
        """How far the stage is, in its own units; cheap enough to call at every step."""
        self.recorder.progress(int(done), int(total), note)

    # --- being stopped ----------------------------------------------------------------------------

    @property
    def stop_requested(self) -> bool:
        """Whether the stage should save a checkpoint and raise StopRequested."""
        return self._stop.is_set()

    def request_stop(self) -> None:
        """Ask the entry to stop at its next safe point."""
        self._stop.set()

    # --- for the stages that release a model ------------------------------------------------------

    @cached_property
    def registry(self) -> Registry:
        """Model versions, aliases and promotions."""
        return self._open_registry()

    @cached_property
    def artifacts(self) -> ArtifactStore:
        """The artifact store itself, to look an artifact up by its digest."""
        return self._open_artifacts()


def local_context(
    tmp_path: Path,
    recipe: Recipe,
    stage_name: str,
    inputs: Mapping[str, Path],
    settings: Settings | None = None,
) -> StageContext:
    """See StageContext.local_context."""
    return StageContext.local_context(tmp_path, recipe, stage_name, inputs, settings)


def jsonable(value: Any, where: str) -> Any:
    """The value as plain JSON types; NaN and infinities, which JSON lacks, become null.

    Raises:
        StageError: It holds something else; the message says where.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if hasattr(value, "item"):  # scalars of numpy and torch
        return jsonable(value.item(), where)
    raise StageError(f"{where} is a {type(value).__name__}, which JSON cannot hold")


def _directory_digest(path: Path | None) -> str:
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path is not None else []:
        if file.is_file():
            digest.update(file.relative_to(path or file).as_posix().encode() + b"\0")
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
