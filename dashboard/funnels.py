"""Every curation stage's summary as one shape: how many came, how many stayed, why others went.

Stages report in their own words, because what they do differs; the board compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Summary = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Funnel:
    """One stage's funnel.

    Attributes:
        stage: Its name.
        unit: What is counted.
        came: Items looked at.
        kept: Items that stayed.
        reasons: Reason -> items it took out. An item may have several reasons.
    """

    stage: str
    unit: str
    came: int
    kept: int
    reasons: dict[str, int]

    @property
    def dropped(self) -> int:
        """Items that went."""
        return max(0, self.came - self.kept)


def funnels(summaries: Mapping[str, Summary]) -> list[Funnel]:
    """The funnels of the stages that have finished, in pipeline order."""
    found = []
    for stage, (unit, read) in _READERS.items():
        summary = summaries.get(stage)
        if summary:
            came, kept, reasons = read(summary)
            if not came:
                continue
            positive = {name: count for name, count in reasons.items() if count > 0}
            found.append(Funnel(stage, unit, came, kept, positive))
    return found


Reading = tuple[int, int, dict[str, int]]


def _ingest(s: Summary) -> Reading:
    kept = sum(s.get("num_samples", {}).values())
    reasons = dict(s.get("quarantine", {}))
    return kept + int(s.get("num_quarantined", 0)), kept, reasons


def _caption2(s: Summary) -> Reading:
    return int(s.get("judged", 0)), int(s.get("kept", 0)), dict(s.get("reasons", {}))


def _charts(s: Summary) -> Reading:
    funnel = dict(s.get("funnel", {}))
    drafted = int(funnel.pop("drafted", s.get("num_charts", 0)))
    funnel.pop("kept", None)
    return drafted, int(s.get("num_charts", 0)), funnel


def _video(s: Summary) -> Reading:
    fates = {k: v for k, v in s.get("funnel", {}).items() if k not in ("kept", "unscored")}
    return int(s.get("num_raw", 0)), int(s.get("num_kept", 0)), fates


def _instruction(s: Summary) -> Reading:
    sources = s.get("sources", {})
    accepted = set(s.get("accepted_sources", ()))
    refused = {
        f"source {name}: {report['verdict']}": int(report["samples"])
        for name, report in sources.items()
        if name not in accepted
    }
    duplicates = sum(int(report.get("duplicates", 0)) for report in sources.values())
    kept = int(s.get("kept", 0))
    not_drawn = max(0, int(s.get("pool", 0)) - kept)
    reasons = {**refused, "duplicate": duplicates, "not drawn from its bucket": not_drawn}
    return int(s.get("raw", 0)), kept, reasons


def _longcot(s: Summary) -> Reading:
    funnel = dict(s.get("funnel", {}))
    came = int(funnel.pop("questions", 0))
    for note in ("distilled", "kept"):
        funnel.pop(note, None)
    return came, int(s.get("num_samples", 0)), funnel


def _rl_data(s: Summary) -> Reading:
    reasons = {name: int(s.get(name, 0)) for name in ("always_right", "never_right")}
    return int(s.get("examined", 0)), int(s.get("kept", 0)), reasons


def _think_fusion(s: Summary) -> Reading:
    replies = dict(s.get("replies", {}))
    kept = int(replies.pop("accepted", 0))
    return kept + sum(replies.values()), kept, replies


_READERS: dict[str, tuple[str, Callable[[Summary], Reading]]] = {
    "curation.ingest": ("samples", _ingest),
    "curation.caption2": ("captions", _caption2),
    "curation.charts": ("charts", _charts),
    "curation.video": ("clips", _video),
    "curation.instruction2": ("conversations", _instruction),
    "curation.longcot": ("questions", _longcot),
    "curation.rl_data": ("prompts", _rl_data),
    "curation.think_fusion": ("thoughts", _think_fusion),
}
