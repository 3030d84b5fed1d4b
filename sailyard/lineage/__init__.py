"""Where everything came from: rows that the stage contract writes, and the questions to ask.

``records`` writes, ``queries`` reads; both take the Database first.
"""

from __future__ import annotations

from sailyard.lineage.database import Database, DatabaseError, open_database
from sailyard.lineage.queries import (
    Ancestry,
    AncestryEdge,
    ArtifactNode,
    EventInfo,
    NotInLineage,
    RunInfo,
    StageRunInfo,
)
from sailyard.lineage.records import ArtifactInfo, Point
from sailyard.lineage.schema import utc_now

__all__ = [
    "Ancestry",
    "AncestryEdge",
    "ArtifactInfo",
    "ArtifactNode",
    "Database",
    "DatabaseError",
    "EventInfo",
    "NotInLineage",
    "Point",
    "RunInfo",
    "StageRunInfo",
    "open_database",
    "utc_now",
]
