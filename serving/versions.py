"""Which version is served, and how another takes its place without a dropped request."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.engine import Engine

log = logging.getLogger(__name__)


class NothingServed(RuntimeError):
    """No version is loaded; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The version that ought to be served.

    Attributes:
        name: What clients see as the model's name.
        digest: Artifact digest of its checkpoint; a change of it is what makes a reload.
        fetch: Brings the checkpoint here and returns its directory. Slow.
    """

    name: str
    digest: str
    fetch: Callable[[], Path]


@dataclass(slots=True, eq=False)
class Served:
    """A loaded version.

    Attributes:
        processor: `model.processor.SailVLProcessor` of the checkpoint.
        context: Most positions a row may have, tokens.
        since: Unix time of loading, seconds.
        leases: Requests that began with this version and are not over.
    """

    name: str
    digest: str
    engine: Engine
    processor: Any
    context: int
    since: float
    leases: int = 0


class Versions:
    """Holds the served version and swaps it.

    Args:
        look_up: Asks the registry for the version behind the alias. Slow; None = none promoted.
        load: Makes a served version of a fetched one. Slow.
        nothing: What to tell clients while no version is promoted.
        prove: Tries a version that has just been loaded, through the server itself; raises when it
            fails. Until it has passed the server answers but is not ready. Slow.
        idle_is_ready: Whether a server that has nothing to serve is as ready as it can be.
    """

    def __init__(
        self,
        look_up: Callable[[], Wanted | None],
        load: Callable[[Wanted], Served],
        nothing: str,
        prove: Callable[[Served], None] | None = None,
        idle_is_ready: bool = False,
    ) -> None:
        self._look_up, self._load, self._nothing = look_up, load, nothing
        self._prove, self._idle_is_ready = prove, idle_is_ready
        self._current: Served | None = None
        self._proven = prove is None
        self._rejected: str | None = None
        self._one_at_a_time = asyncio.Lock()
        self._leaving: set[asyncio.Task[None]] = set()
        self.last_error: str | None = None
        self.on_reload: Callable[[bool], None] = lambda ok: None

    @property
    def current(self) -> Served | None:
        """The served version, if one is loaded."""
        return self._current

    def lease(self) -> Served:
        """The served version, kept until `release`: a request ends where it began.

        Raises:
            NothingServed: None is loaded.
        """
        if self._current is None:
            raise NothingServed(self.last_error or self._nothing)
        self._current.leases += 1
        return self._current

    def release(self, served: Served) -> None:
        """The request is over. Like `lease`, only from the event loop's thread."""
        served.leases -= 1

    async def refresh(self) -> bool:
        """Look the alias up and load what it names; True when the served version changed.

        A version that cannot be loaded leaves the old one in place: `last_error` says why.
        """
        async with self._one_at_a_time:
            try:
                wanted = await asyncio.to_thread(self._look_up)
                if wanted is None or self._is_served(wanted):
                    self.last_error = None
                    return False
                log.info("loading %s (%s)", wanted.name, wanted.digest[:12])
                served = await asyncio.to_thread(self._load, wanted)
            except Exception as error:  # a bad promotion must not take the good version down
                reason = f"{type(error).__name__}: {error}"
                if reason != self.last_error:  # once, not at every look
                    log.exception("the promoted version could not be loaded")
                    self.on_reload(False)
                self.last_error = reason
                return False
            self.last_error = None
            old, self._current = self._current, served
            log.info("serving %s (%s)", served.name, served.digest[:12])
            self.on_reload(True)
            if old is not None:
                self._retire(old)
            if self._prove is not None:
                await self._put_to_the_proof(self._prove, served)
            return True

    async def _put_to_the_proof(self, prove: Callable[[Served], None], served: Served) -> None:
        try:
            await asyncio.to_thread(prove, served)
        except Exception as error:
            log.exception("%s failed its smoke test", served.name)
            self._rejected = f"{served.name} failed its smoke test: {error}"
        else:
            self._proven = True
            log.info("%s passed its smoke test", served.name)

    async def watch(self, seconds: float) -> None:
        """Look the alias up again and again, until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(seconds)

    async def close(self) -> None:
        """Finish every reply and stop all engines."""
        current, self._current = self._current, None
        if current is not None:
            self._retire(current)
        await asyncio.gather(*self._leaving)

    def status(self) -> dict[str, Any]:
        """What /ready tells."""
        served = self._current
        idle = self._idle_is_ready and served is None and self.last_error is None
        return {
            "ready": idle or (served is not None and self._proven),
            "model": served.name if served else None,
            "digest": served.digest if served else None,
            "loaded_seconds_ago": round(time.time() - served.since, 1) if served else None,
            "error": self._rejected or self.last_error or (None if served else self._nothing),
            "rejected": self._rejected is not None,
        }

    def _is_served(self, wanted: Wanted) -> bool:
        served = self._current
        return served is not None and (served.digest, served.name) == (wanted.digest, wanted.name)

    def _retire(self, old: Served) -> None:
        async def drain() -> None:
            while old.leases:
                await asyncio.sleep(0.05)
            await asyncio.to_thread(old.engine.close)
            log.info("%s has finished its last reply", old.name)

        task = asyncio.create_task(drain())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
