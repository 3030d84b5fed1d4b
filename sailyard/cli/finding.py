"""The outcome of one of ``sailyard doctor``'s checks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: What was looked at.
        level: ok | note (something optional is missing) | problem.
        text: What was found.
        way_out: What to do; "" when all is well.
    """

    check: str
    level: str
    text: str
    way_out: str = ""
