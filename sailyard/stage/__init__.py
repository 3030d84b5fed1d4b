"""The contract every stage runs under, wherever it runs."""

from __future__ import annotations

from sailyard.stage.checkpoints import Checkpoints
from sailyard.stage.context import StageContext, local_context
from sailyard.stage.errors import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_RESUME,
    RankDone,
    StageError,
    StopRequested,
)
from sailyard.stage.keys import cache_key, resolve_section, stage_seed
from sailyard.stage.ranks import Rank
from sailyard.stage.recorder import MemoryRecorder

__all__ = [
    "EXIT_FAILED",
    "EXIT_OK",
    "EXIT_RESUME",
    "Checkpoints",
    "MemoryRecorder",
    "Rank",
    "RankDone",
    "StageContext",
    "StageError",
    "StopRequested",
    "cache_key",
    "local_context",
    "resolve_section",
    "stage_seed",
]
