"""``sailyard status``, ``report`` and ``lineage``: what is there, and where it came from."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.tree import Tree

from sailyard.cli.output import (
    ago,
    as_plain,
    byte_size,
    console,
    duration,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from sailyard.lineage import Ancestry, ArtifactNode
    from sailyard.yard import Yard

JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Direction(StrEnum):
    """Which way to follow the graph."""

    up = "up"
    down = "down"
    both = "both"


def status(
    run_id: Annotated[str, typer.Argument(help="A run; without one, all runs.")] = "",
    models: Annotated[bool, typer.Option(help="List model versions instead.")] = False,
    promotions: Annotated[bool, typer.Option(help="List promotions instead.")] = False,
    events: Annotated[bool, typer.Option(help="List events instead.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")] = 20,
    as_json: JSON = False,
) -> None:
    """List runs, the stages of one run, model versions, promotions or events."""
    from sailyard.yard import Yard

    yard = Yard()
    if models:
        _models(yard, limit, as_json)
    elif promotions:
        _promotions(yard, limit, as_json)
    elif events:
        _events(yard, run_id, limit, as_json)
    elif run_id:
        _stages(yard, run_id, as_json)
    else:
        _runs(yard, limit, as_json)


def _runs(yard: Yard, limit: int, as_json: bool) -> None:
    from sailyard.lineage import queries, records

    records.mark_lost(yard.database)
    found = queries.list_runs(yard.database, limit)
    if as_json:
        print_json(found)
        return
    rows = [
        (
            run.id,
            run.recipe_name,
            run.status,
            f"{run.num_finished}/{run.num_stages}",
            run.num_cached,
            ago(run.updated_at),
        )
        for run in found
    ]
    columns = ("run", "recipe", "status", "stages", "cached", "last sign")
    print_table("" if rows else "no run yet: sailyard run --recipe tiny", columns, rows)


def _stages(yard: Yard, run_id: str, as_json: bool) -> None:
    from sailyard.runs import stage_state

    states = stage_state(run_id, yard)
    if as_json:
        print_json(states)
        return
    rows = []
    for state in states:
        info = state.info
        word = "cached" if state.cached else state.status
        share = f"{info.progress_done}/{info.progress_total}" if info else ""
        note = info.error or info.progress_note if info else ""
        seconds = duration(info.seconds) if info and info.finished_at else ""
        progress = share if info and info.progress_total else ""
        rows.append((state.stage, word, seconds, progress, note.splitlines()[0] if note else ""))
    print_table(run_id, ("stage", "status", "time", "progress", "note"), rows)


def _models(yard: Yard, limit: int, as_json: bool) -> None:
    versions = yard.registry.versions(limit=limit)
    if as_json:
        print_json([{"ref": version.ref, **as_plain(version)} for version in versions])
        return
    rows = [
        (
            version.ref,
            ", ".join(version.aliases),
            _figure(version.metrics.get("overall.accuracy")),
            version.checkpoint[:12],
            version.run_id,
            ago(version.created_at),
        )
        for version in versions
    ]
    columns = ("version", "aliases", "accuracy", "checkpoint", "run", "registered")
    print_table("" if rows else "no model version is registered yet", columns, rows)


def _promotions(yard: Yard, limit: int, as_json: bool) -> None:
    moves = yard.registry.promotions(limit=limit)
    if as_json:
        print_json(moves)
        return
    rows = [
        (
            move.at.isoformat(timespec="seconds"),
            move.alias,
            move.action,
            move.previous or "-",
            move.version,
            move.actor,
            move.reason,
        )
        for move in moves
    ]
    print_table("", ("when", "alias", "action", "from", "to", "by", "why"), rows)


def _events(yard: Yard, run_id: str, limit: int, as_json: bool) -> None:
    from sailyard.lineage import queries

    found = queries.events(yard.database, run_id, limit)
    if as_json:
        print_json(found)
        return
    rows = [
        (event.at.isoformat(timespec="seconds"), event.run_id, event.stage, event.kind)
        for event in found
    ]
    print_table("", ("when", "run", "stage", "event"), rows)


def report(
    run_id: Annotated[str, typer.Argument(help="A run; without one, the latest.")] = "",
    as_json: JSON = False,
) -> None:
    """What a run achieved: figures per stage, judges, alignment, losses, rewards, accuracy."""
    from sailyard.report import build_report, report_tables
    from sailyard.yard import Yard

    body = build_report(Yard(), run_id)
    if as_json:
        print_json(body)
        return
    for title, columns, rows in report_tables(body):
        print_table(title, columns, rows)


def lineage(
    what: Annotated[
        str,
        typer.Argument(help="Digest (its start will do), model version or alias; none: list."),
    ] = "",
    direction: Annotated[Direction, typer.Option(help="Which way to follow.")] = Direction.up,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many artifacts.")] = 200,
    as_json: JSON = False,
) -> None:
    """Show what an artifact was made from (up), or what was made from it (down)."""
    from sailyard.lineage import queries
    from sailyard.yard import Yard

    yard = Yard()
    if not what:
        found = queries.list_artifacts(yard.database, limit=limit)
        if as_json:
            print_json(found)
        else:
            rows = [(n.digest[:12], n.kind, byte_size(n.size), n.run_id) for n in found]
            print_table("", ("artifact", "kind", "size", "first made by"), rows)
        return
    root = _resolve(yard, what)
    graph = queries.ancestry(yard.database, root.digest, direction.value, limit)
    if as_json:
        print_json(graph)
        return
    for up in (True, False):
        if direction.value != ("down" if up else "up"):
            console.print(_tree(graph, up))
    if graph.truncated:
        console.print(f"only the first {limit} artifacts; more with --limit")


def _resolve(yard: Yard, what: str) -> ArtifactNode:
    from sailyard.lineage import NotInLineage, queries
    from sailyard.registry import RegistryError

    try:
        return queries.find_artifact(yard.database, what)
    except NotInLineage as error:
        try:
            version = yard.registry.version(what)
        except RegistryError:
            raise error from None
        return queries.find_artifact(yard.database, version.checkpoint)


def _tree(graph: Ancestry, up: bool) -> Tree:
    nodes = {node.digest: node for node in graph.nodes}
    edges: dict[str, list[str]] = {}
    for edge in graph.edges:
        near, far = (edge.target, edge.source) if up else (edge.source, edge.target)
        if far not in edges.setdefault(near, []):
            edges[near].append(far)
    tree = Tree(f"{'made from' if up else 'went into'}: {_label(nodes[graph.root])}")
    shown = {graph.root}

    def grow(branch: Tree, digest: str) -> None:
        for other in edges.get(digest, []):
            if other in shown:
                branch.add(f"{_label(nodes[other])} (above)", style="dim")
                continue
            shown.add(other)
            grow(branch.add(_label(nodes[other])), other)

    grow(tree, graph.root)
    return tree


def _label(node: ArtifactNode) -> str:
    return f"{node.kind} {node.digest[:12]} ({byte_size(node.size)})"


def _figure(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, (int, float)) else ""
