"""Page "Lineage": from any artifact back to all that it was made from."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from typing import Any

import streamlit as st

from dashboard import data, look
from dashboard.selection import STAGE
from sailyard.lineage import Ancestry, ArtifactNode, RunInfo, queries

ARTIFACT = "artifact"
_PICKER, _FLOW = "artifact picker", "lineage graph"
# First that the run has made: what people come here to trace.
PREFERRED = (
    "post_training.mixed_rl/checkpoint",
    "post_training.think_fusion_sft/checkpoint",
    "post_training.verifiable_rl/checkpoint",
    "post_training.soup/checkpoint",
    "pretraining.multitask/checkpoint",
    "pretraining.basic/checkpoint",
    "alignment.world_knowledge/checkpoint",
)
DIRECTIONS = {"made from": "up", "used for": "down", "both": "both"}
# The whole way back is two dozen steps: readable only piece by piece.
STEPS, MOST_STEPS = 3, 30
COLUMN_WIDTH, ROW_HEIGHT, NODE_WIDTH = 195, 66, 160


def page(run: RunInfo | None) -> None:
    """Draw the page."""
    look.page_header(
        "Lineage", "Every artifact knows the stage, the run and the artifacts it came from."
    )
    if run is None:
        look.nothing_yet("There is no run yet.", look.HOW_TO_RUN)
        return
    made = data.nodes_of_run(run.id)
    linked = st.query_params.get(ARTIFACT, "") or _made_by(st.query_params.get(STAGE, ""), made)
    choices = list(made.items())
    if linked and linked not in made.values():
        try:
            node = data.find_artifact(linked)
        except data.UNAVAILABLE as error:
            st.warning(str(error))
        else:
            choices.insert(0, (_name(node), node.digest))
            linked = node.digest
    if not choices:
        look.nothing_yet("This run has made nothing yet.", "Its first artifacts appear here.")
        return
    names = {digest: name for name, digest in choices}
    if st.session_state.get(_PICKER) not in names:
        st.session_state[_PICKER] = linked if linked in names else _preferred(made, choices)
    left, middle, right = st.columns([2.6, 1.7, 1.3], vertical_alignment="bottom", gap="medium")
    digest = left.selectbox(
        "Artifact", list(names), key=_PICKER, format_func=lambda each: names[each]
    )
    shown = middle.segmented_control(
        "Show what it was", list(DIRECTIONS), default="made from", key="lineage direction"
    )
    steps = right.slider("Steps", 1, MOST_STEPS, STEPS, key="lineage steps")
    direction: Any = DIRECTIONS[shown or "made from"]
    whole = queries.ancestry(data.yard().database, digest, direction)
    graph = within(whole, steps)
    if len(graph.nodes) < len(whole.nodes) or whole.truncated:
        more = "more than " if whole.truncated else ""
        st.caption(f"{len(graph.nodes)} of {more}{len(whole.nodes)} artifacts, the nearest.")
    _legend(graph)
    clicked = _draw(graph)
    by_digest = {node.digest: node for node in graph.nodes}
    _describe(by_digest.get(clicked or digest, by_digest[digest]), whole)


def within(graph: Ancestry, steps: int) -> Ancestry:
    """The part of a graph at most so many edges up, or so many down, from its root."""
    sources: dict[str, set[str]] = defaultdict(set)
    targets: dict[str, set[str]] = defaultdict(set)
    for edge in graph.edges:
        sources[edge.target].add(edge.source)
        targets[edge.source].add(edge.target)
    near = {graph.root}
    for neighbours in (sources, targets):
        walked, frontier = {graph.root}, {graph.root}
        for _ in range(steps):
            frontier = {n for digest in frontier for n in neighbours[digest]} - walked
            walked |= frontier
        near |= walked
    return Ancestry(
        graph.root,
        tuple(node for node in graph.nodes if node.digest in near),
        tuple(edge for edge in graph.edges if {edge.source, edge.target} <= near),
        graph.truncated,
    )


def _made_by(stage: str, made: dict[str, str]) -> str:
    """The first thing a linked stage made; "" when no stage is linked or it made nothing yet."""
    if not stage:
        return ""
    found = [digest for name, digest in made.items() if name.startswith(f"{stage}/")]
    if not found:
        st.info(f"{stage} has made nothing in this run yet; its state and log are on page Runs.")
        return ""
    return found[0]


def _preferred(made: dict[str, str], choices: list[tuple[str, str]]) -> str:
    for name in PREFERRED:
        if name in made:
            return made[name]
    return choices[-1][1]


def _name(node: ArtifactNode) -> str:
    return f"{node.stage or look.short(node.digest)}/{_output(node)}"


def layers(graph: Ancestry) -> dict[str, int]:
    """Column of every node: the last ones rightmost, each one just left of its first use."""
    children: dict[str, set[str]] = defaultdict(set)
    for edge in graph.edges:
        children[edge.source].add(edge.target)
    ahead: dict[str, int] = {}

    def steps_ahead(digest: str, path: frozenset[str]) -> int:
        if digest not in ahead:
            after = [steps_ahead(c, path | {c}) for c in sorted(children[digest]) if c not in path]
            ahead[digest] = 1 + max(after, default=-1)
        return ahead[digest]

    for node in graph.nodes:
        steps_ahead(node.digest, frozenset({node.digest}))
    longest = max(ahead.values(), default=0)
    return {digest: longest - steps for digest, steps in ahead.items()}


def positions(graph: Ancestry) -> dict[str, tuple[float, float]]:
    """Right to left by layer; inside a layer, near the mean height of what a node is used for."""
    column = layers(graph)
    rows: dict[int, list[str]] = defaultdict(list)
    for node in graph.nodes:
        rows[column[node.digest]].append(node.digest)
    children: dict[str, list[str]] = defaultdict(list)
    for edge in graph.edges:
        children[edge.source].append(edge.target)
    height: dict[str, float] = {}
    for layer in sorted(rows, reverse=True):
        members = rows[layer]
        wanted = {
            digest: sum(height[c] for c in known) / len(known)
            if (known := [c for c in children[digest] if c in height])
            else 0.0
            for digest in members
        }
        members.sort(key=lambda digest: wanted[digest])
        top = -ROW_HEIGHT * (len(members) - 1) / 2
        for place, digest in enumerate(members):
            height[digest] = top + ROW_HEIGHT * place
    return {digest: (column[digest] * COLUMN_WIDTH, height[digest]) for digest in height}


def _draw(graph: Ancestry) -> str | None:
    if importlib.util.find_spec("streamlit_flow") is None:
        st.graphviz_chart(dot(graph), width="stretch")
        return None
    from streamlit_flow import streamlit_flow
    from streamlit_flow.state import StreamlitFlowState

    # The component sends its own state back; a new one is made only for another graph, or every
    # click would redraw from scratch.
    identity = f"{graph.root} {len(graph.nodes)} {len(graph.edges)}"
    if st.session_state.get("lineage identity") != identity:
        st.session_state["lineage identity"] = identity
        st.session_state["lineage state"] = StreamlitFlowState(*_flow(graph))
    st.session_state["lineage state"] = streamlit_flow(
        f"{_FLOW} {identity}",
        st.session_state["lineage state"],
        height=520,
        fit_view=True,
        min_zoom=0.1,
        show_minimap=False,
        get_node_on_click=True,
        hide_watermark=True,
        style={"backgroundColor": "#ffffff"},
    )
    selected: str | None = st.session_state["lineage state"].selected_id
    return selected


def _flow(graph: Ancestry) -> tuple[list[Any], list[Any]]:
    from streamlit_flow.elements import StreamlitFlowEdge, StreamlitFlowNode

    place = positions(graph)
    nodes = [
        StreamlitFlowNode(
            node.digest,
            place[node.digest],
            {"content": _label(node)},
            "default",
            "right",
            "left",
            draggable=False,
            selectable=True,
            style={
                "border": f"{3 if node.digest == graph.root else 1}px solid {_colour(node)}",
                "borderLeft": f"7px solid {_colour(node)}",
                "borderRadius": "8px",
                "background": "#ffffff",
                "color": "#17242d",
                "width": f"{NODE_WIDTH}px",
                "padding": "4px 8px",
                "fontSize": "12px",
                "textAlign": "left",
            },
        )
        for node in graph.nodes
    ]
    pairs = dict.fromkeys((edge.source, edge.target) for edge in graph.edges)
    edges = [
        StreamlitFlowEdge(
            f"{source}-{target}", source, target, style={"stroke": "#9bb0ba"}, animated=False
        )
        for source, target in pairs
    ]
    return nodes, edges


def _label(node: ArtifactNode) -> str:
    """The step and what it made; the colour says which group the step belongs to."""
    return f"**{node.stage.rpartition('.')[2] or 'artifact'}**  \n{_output(node)}"


def _output(node: ArtifactNode) -> str:
    """What the artifact is called by the stage that makes it."""
    return node.kind.rpartition("/")[2]


def _legend(graph: Ancestry) -> None:
    used = {node.stage.partition(".")[0] for node in graph.nodes}
    st.html(
        " ".join(
            f'<span style="color:{colour}">&#9632;</span> {look.label(group)}&emsp;'
            for group, colour in look.GROUP_COLOURS.items()
            if group in used
        )
    )


def dot(graph: Ancestry) -> str:
    """The graph in Graphviz's language, for boards without the interactive component."""
    lines = ["digraph { rankdir=LR; node [shape=box style=rounded fontname=Helvetica fontsize=10]"]
    for node in graph.nodes:
        text = f"{node.stage or look.short(node.digest)}\\n{_output(node)}"
        width = 3 if node.digest == graph.root else 1
        lines.append(f'"{node.digest}" [label="{text}" color="{_colour(node)}" penwidth={width}]')
    pairs = dict.fromkeys((edge.source, edge.target) for edge in graph.edges)
    lines += [f'"{source}" -> "{target}"' for source, target in pairs]
    return "\n".join([*lines, "}"])


def _colour(node: ArtifactNode) -> str:
    return look.GROUP_COLOURS.get(node.stage.split(".")[0], "#6c7a83")


def _describe(node: ArtifactNode, graph: Ancestry) -> None:
    st.subheader(node.stage or "Artifact")
    facts, links, metadata = st.columns([1.2, 1, 1], gap="medium")
    with facts:
        st.markdown(
            f"**{_output(node)}** · {look.size_text(node.size)} · "
            f"made in run [{node.run_id}](/?run={node.run_id}&stage={node.stage})"
        )
        st.code(node.digest, language=None, wrap_lines=True)
    with links:
        _links("Made from", [(e.input, e.source) for e in graph.edges if e.target == node.digest])
        _links("Used for", [(e.stage, e.target) for e in graph.edges if e.source == node.digest])
    with metadata:
        _manifest(node)


def _links(title: str, found: list[tuple[str, str]]) -> None:
    if found:
        lines = [
            f"- {name}: [`{look.short(digest)}`](/lineage?artifact={digest})"
            for name, digest in sorted(set(found))
        ]
        st.markdown("\n".join([f"**{title}**", "", *lines]))


def _manifest(node: ArtifactNode) -> None:
    try:
        manifest = data.artifact(node.digest)
    except data.UNAVAILABLE as error:
        st.warning(str(error))
        return
    if manifest.meta:
        st.markdown("**Metadata**")
        st.json(manifest.meta, expanded=2)
    with st.expander(f"Files ({len(manifest.files)})"):
        st.dataframe(
            [
                {"file": f.name, "size": look.size_text(f.size), "sha256": look.short(f.sha256)}
                for f in manifest.files
            ],
            hide_index=True,
        )
