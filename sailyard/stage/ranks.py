"""Which of several processes of one stage this one is.

Ranks follow torchrun's convention: RANK, WORLD_SIZE and LOCAL_RANK in the environment. Rank 0 is
the stage as the contract knows it: it looks up, locks, publishes and records. The others only run
the entry beside it (``sailyard.stage.follower``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from sailyard.stage.errors import StageError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True, slots=True)
class Rank:
    """One process of a stage.

    Attributes:
        number: 0 to size - 1, over all machines.
        size: Processes of the stage.
        local: Number on its own machine, from 0.
    """

    number: int = 0
    size: int = 1
    local: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Rank:
        """As torchrun sets it; a single process without it.

        Raises:
            StageError: The variables do not go together.
        """
        values = [environment.get(name) for name in VARIABLES]
        if values == [None] * 3:
            return cls()
        try:
            rank = cls(*(int(value or "") for value in values))
        except ValueError:
            rank = cls(-1)
        if not 0 <= rank.local <= rank.number < rank.size:
            raise StageError(
                f"RANK, WORLD_SIZE and LOCAL_RANK are {', '.join(map(str, values))}; start several "
                "processes with torchrun, or unset the three for one"
            )
        return rank


def be_alone() -> None:
    """Forget the other ranks: in a stage of rank 0's alone they have left already."""
    for name in VARIABLES:
        os.environ.pop(name, None)
