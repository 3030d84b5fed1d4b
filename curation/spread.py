"""One network, many samples: a stage's map step in this process, or over a Ray cluster.

Batches are cut before it is decided who works on them, and a worker knows nothing but the batch it
has in hand, so the results are the same, and in the same order, wherever they were made (to the
last bit where the kind of device and the number of threads are). SAILYARD_RAY_ADDRESS names the
cluster. What workers load they find by its path, or fetch from the artifact store by its digest.
"""

from __future__ import annotations

import logging
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sailyard.samples import Sample, SampleReader
from sailyard.settings import Settings, get_settings
from sailyard.yard import Yard

if TYPE_CHECKING:
    from sailyard.stage import StageContext

Item = TypeVar("Item")
Result = TypeVar("Result")

# Items that a worker has in hand or in its queue: enough to keep it busy while another is slow.
AHEAD = 4
# Of one item, each on a new worker; what ends every worker is no accident.
RETRIES = 3


class NoRoom(ValueError):
    """The Ray cluster is smaller than the settings ask for."""


class WorkerLost(RuntimeError):
    """One item ended every worker that tried it."""


@dataclass(frozen=True, slots=True)
class Input:
    """An input artifact that any process of the cluster can open.

    Attributes:
        path: Where it lies on the machine that runs the stage.
        digest: Its name in the artifact store.
    """

    path: Path
    digest: str

    @classmethod
    def of(cls, ctx: StageContext, name: str) -> Input:
        """The input of that name."""
        return cls(ctx.input(name), ctx.input_digest(name))

    def folder(self) -> Path:
        """Its directory on this machine."""
        return self.path if self.path.is_dir() else Yard().artifacts.fetch(self.digest)


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples to work on together.

    Attributes:
        start: How many came before it.
        positions: Of its samples in their dataset.
        samples: As they were read.
    """

    start: int
    positions: Sequence[int]
    samples: list[Sample]


class Batches(Sequence[Batch]):
    """A dataset's samples, in the order of `positions`, `size` at a time; read when asked for."""

    def __init__(self, reader: SampleReader, positions: Sequence[int], size: int) -> None:
        self.reader, self.positions, self.size = reader, positions, size

    def __len__(self) -> int:
        return -(-len(self.positions) // self.size)

    def __getitem__(self, number: int) -> Batch:  # type: ignore[override]
        if not 0 <= number < len(self):
            raise IndexError(f"batch {number} of {len(self)}")
        start = number * self.size
        positions = self.positions[start : start + self.size]
        return Batch(start, positions, [self.reader[position] for position in positions])


def spread(
    items: Sequence[Item], make_worker: Callable[[], Callable[[Item], Result]]
) -> Iterator[Result]:
    """What a worker makes of each item, in order; few items are in memory at a time.

    A worker that is lost on the cluster is replaced and does its item again. Closing the iterator
    early ends all work.

    Args:
        items: Read one after another, in this process alone.
        make_worker: Loads what a worker needs; called once in each process that works. Must be
            picklable, as must items and results: Ray hands them from process to process.

    Raises:
        NoRoom: The cluster cannot hold SAILYARD_RAY_WORKERS workers.
        WorkerLost: One item ended its worker again and again.
        Exception: Whatever a worker raised.
    """
    settings = get_settings()
    if settings.ray_address and len(items):
        yield from _over_ray(items, make_worker, settings)
    else:
        yield from map(make_worker(), items) if len(items) else ()


class _Worker:
    """What an actor is made of."""

    def __init__(self, make_worker: Callable[[], Callable[[Any], Any]]) -> None:
        self._make_worker = make_worker

    @cached_property
    def _work(self) -> Callable[[Any], Any]:
        # Not before the first item: then an error in it is an error of that item, as any other.
        return self._make_worker()

    def work(self, item: Any) -> Any:
        return self._work(item)


def _over_ray(
    items: Sequence[Item],
    make_worker: Callable[[], Callable[[Item], Result]],
    settings: Settings,
) -> Iterator[Result]:
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    with _cluster(settings) as device:
        remote: Any = ray.remote(_Worker)
        actor = remote.options(
            num_cpus=int(device == "CPU"),
            num_gpus=int(device == "GPU"),
            max_restarts=-1,
            max_task_retries=RETRIES,
        )
        workers = [actor.remote(make_worker) for _ in range(settings.ray_workers)]
        waiting: deque[Any] = deque()
        done = 0
        try:
            for number, item in enumerate(items):
                if len(waiting) == AHEAD * len(workers):
                    yield ray.get(waiting.popleft())
                    done += 1
                waiting.append(workers[number % len(workers)].work.remote(item))
            while waiting:
                yield ray.get(waiting.popleft())
                done += 1
        except RayTaskError as error:
            raise (error.cause or error) from error
        except RayActorError as error:
            raise WorkerLost(
                f"item {done} of {len(items)} was tried {RETRIES + 1} times, and each time its "
                f"worker was lost; if memory ran out, make batches smaller: {error}"
            ) from error
        finally:
            for worker in workers:
                ray.kill(worker)


@contextmanager
def _cluster(settings: Settings) -> Iterator[str]:
    """Join the cluster unless this process has; yields the device that workers count by."""
    import ray

    joined = not ray.is_initialized()
    if joined:
        local = settings.ray_address == "local"
        with _own_signals():
            ray.init(
                address=settings.ray_address,
                num_cpus=settings.ray_workers if local else None,
                include_dashboard=False if local else None,
                logging_level=logging.WARNING,
            )
    try:
        there = ray.cluster_resources()
        device = "GPU" if there.get("GPU") else "CPU"
        if there.get(device, 0) < settings.ray_workers:
            raise NoRoom(
                f"SAILYARD_RAY_WORKERS is {settings.ray_workers}, but the Ray cluster "
                f"{settings.ray_address} has {int(there.get(device, 0))} {device}s: one a worker"
            )
        yield device
    finally:
        if joined:
            ray.shutdown()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray's driver takes SIGTERM for itself; a stage wants it back."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
