"""Page "Lineage": from any artifact back to all that it was made from."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from typing import Any

import streamlit as st

from dashboard import data, look
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
COLUMN_WIDTH, ROW_HEIGHT = 260, 78


def page(run: RunInfo | None) -> None:
    """Draw the page."""
    look.page_header(
        "Lineage", "Every artifact knows the stage, the run and the artifacts it came from."
    )
    if run is None:
        look.nothing_yet("There is no run yet.", look.HOW_TO_RUN)
        return
    made = data.nodes_of_run(run.id)
    linked = st.query_params.get(ARTIFACT, "")
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
    left, right = st.columns([3, 1], vertical_alignment="bottom")
    digest = left.selectbox(
        "Artifact", list(names), key=_PICKER, format_func=lambda each: names[each]
    )
    shown = right.segmented_control(
        "Show what it was", list(DIRECTIONS), default="made from", key="lineage direction"
    )
    direction: Any = DIRECTIONS[shown or "made from"]
    graph = queries.ancestry(data.yard().database, digest, direction)
    if graph.truncated:
        st.caption(f"Only the nearest {len(graph.nodes)} artifacts are shown.")
    canvas, panel = st.columns([5, 2], gap="medium")
    with canvas:
        clicked = _draw(graph)
    with panel:
        by_digest = {node.digest: node for node in graph.nodes}
        _describe(by_digest.get(clicked or digest, by_digest[digest]), graph)


def _preferred(made: dict[str, str], choices: list[tuple[str, str]]) -> str:
    for name in PREFERRED:
        if name in made:
            return made[name]
    return choices[-1][1]


def _name(node: ArtifactNode) -> str:
    return f"{node.stage}/{node.kind}" if node.stage else f"{node.kind} {look.short(node.digest)}"


def layers(graph: Ancestry) -> dict[str, int]:
    """Column of every node: sources at 0, everything right of all it was made from."""
    parents: dict[str, set[str]] = defaultdict(set)
    for edge in graph.edges:
        parents[edge.target].add(edge.source)
    column: dict[str, int] = {}

    def place(digest: str, path: frozenset[str]) -> int:
        if digest not in column:
            above = [place(p, path | {p}) for p in sorted(parents[digest]) if p not in path]
            column[digest] = 1 + max(above, default=-1)
        return column[digest]

    for node in graph.nodes:
        place(node.digest, frozenset({node.digest}))
    return column


def positions(graph: Ancestry) -> dict[str, tuple[float, float]]:
    """Left to right by layer; inside a layer, near the mean height of what a node is made from."""
    column = layers(graph)
    rows: dict[int, list[str]] = defaultdict(list)
    for node in graph.nodes:
        rows[column[node.digest]].append(node.digest)
    parents: dict[str, list[str]] = defaultdict(list)
    for edge in graph.edges:
        parents[edge.target].append(edge.source)
    height: dict[str, float] = {}
    for layer in sorted(rows):
        members = rows[layer]
        wanted = {
            digest: sum(height[p] for p in known) / len(known)
            if (known := [p for p in parents[digest] if p in height])
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
        height=620,
        fit_view=True,
        min_zoom=0.1,
        show_minimap=len(graph.nodes) > 12,
        get_node_on_click=True,
        hide_watermark=True,
        style={"backgroundColor": "#ffffff"},
    )
    selected: str | None = st.session_state["lineage state"].selected_id
    return selected


def _flow(graph: Ancestry) -> tuple[list[Any], list[Any]]:
    from streamlit_flow.elements import StreamlitFlowEdge, StreamlitFlowNode

    place = positions(graph)
    outputs = {edge.target: edge.output for edge in graph.edges}
    nodes = [
        StreamlitFlowNode(
            node.digest,
            place[node.digest],
            {"content": f"**{node.stage or node.kind}**  \n{outputs.get(node.digest, node.kind)}"},
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
                "width": "210px",
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


def dot(graph: Ancestry) -> str:
    """The graph in Graphviz's language, for boards without the interactive component."""
    lines = ["digraph { rankdir=LR; node [shape=box style=rounded fontname=Helvetica fontsize=10]"]
    for node in graph.nodes:
        text = f"{node.stage or node.kind}\\n{look.short(node.digest)}"
        width = 3 if node.digest == graph.root else 1
        lines.append(f'"{node.digest}" [label="{text}" color="{_colour(node)}" penwidth={width}]')
    pairs = dict.fromkeys((edge.source, edge.target) for edge in graph.edges)
    lines += [f'"{source}" -> "{target}"' for source, target in pairs]
    return "\n".join([*lines, "}"])


def _colour(node: ArtifactNode) -> str:
    return look.GROUP_COLOURS.get(node.stage.split(".")[0], "#6c7a83")


def _describe(node: ArtifactNode, graph: Ancestry) -> None:
    st.subheader(node.stage or node.kind)
    st.markdown(
        f"**{node.kind}** · {look.size_text(node.size)}  \n"
        f"made in run [{node.run_id}](/?run={node.run_id}&stage={node.stage})"
    )
    st.code(node.digest, language=None, wrap_lines=True)
    inputs = {edge.input: edge.source for edge in graph.edges if edge.target == node.digest}
    if inputs:
        st.markdown("**Made from**")
        st.markdown(
            "\n".join(
                f"- {name}: [`{look.short(digest)}`](/lineage?artifact={digest})"
                for name, digest in sorted(inputs.items())
            )
        )
    try:
        manifest = data.artifact(node.digest)
    except data.UNAVAILABLE as error:
        st.warning(str(error))
        return
    if manifest.meta:
        st.markdown("**Metadata**")
        st.json(manifest.meta, expanded=2)
    with st.expander(f"{len(manifest.files)} files"):
        st.dataframe(
            [
                {"file": f.name, "size": look.size_text(f.size), "sha256": look.short(f.sha256)}
                for f in manifest.files
            ],
            hide_index=True,
        )
