"""How a stage can end, and the exit codes that say so."""

from __future__ import annotations

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_RESUME = 75
"""EX_TEMPFAIL of sysexits.h: nothing is broken, run the same command again."""


class StageError(ValueError):
    """A stage broke the contract or was asked for the impossible; the message says what to do."""


class StopRequested(BaseException):
    """The stage was asked to stop and has saved what it wants to keep.

    Raised by an entry after it saw ``ctx.stop_requested``, and by the contract itself inside
    stages that keep no checkpoints. Not an ``Exception``: a loop that survives bad items with
    ``except Exception`` must not survive this.
    """


class RankDone(BaseException):
    """This rank has done its share of a stage; rank 0 ends the stage. Not an ``Exception``, as
    StopRequested is none."""
