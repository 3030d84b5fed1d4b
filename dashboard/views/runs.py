"""Page "Runs": how far a run is, stage by stage, with the log of any of them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import altair as alt
import streamlit as st

from dashboard import data, look
from dashboard.selection import STAGE
from sailyard.lineage import RunInfo, StageRunInfo
from sailyard.runs import StageState

REFRESH_SECONDS = 3.0
_STAGE_PICKER, _TABLE = "stage picker", "stage table"


def page(run: RunInfo | None) -> None:
    """Draw the page; it refreshes itself while the run is on its way."""
    look.page_header("Runs", "Every stage of the pipeline, in order, with what it is doing now.")
    if run is None:
        look.nothing_yet("There is no run yet.", look.HOW_TO_RUN)
        return
    live = run.status in ("running", "created")
    st.fragment(_body, run_every=REFRESH_SECONDS if live else None)(run.id)


def _body(run_id: str) -> None:
    run = next((each for each in data.runs() if each.id == run_id), None)
    if run is None:
        look.nothing_yet("This run is gone.", "Pick another one on the left.")
        return
    try:
        states = data.stages(run_id)
    except data.UNAVAILABLE as error:
        st.error(str(error))
        return
    _headline(run, states)
    left, right = st.columns([3, 2], gap="medium")
    with left:
        st.subheader("Stages")
        _table(states)
    with right:
        st.subheader("Where the time went")
        _timeline(states)
    _details(run_id, states)


def _headline(run: RunInfo, states: Sequence[StageState]) -> None:
    infos = [state.info for state in states if state.info is not None]
    spent = sum(info.seconds for info in infos if not info.cached)
    saved = sum(info.computed_seconds for info in infos if info.cached)
    columns = st.columns(5)
    colour = look.status_colour(run.status)
    columns[0].metric("Status", f":{colour}[{look.status_text(run.status)}]")
    columns[1].metric("Finished", f"{run.num_finished} / {run.num_stages}")
    columns[2].metric("Reused", str(run.num_cached), help="Taken from an earlier run's results.")
    columns[3].metric("Time in stages", look.seconds_text(spent))
    columns[4].metric("Time saved", look.seconds_text(saved), help="What reuse did not compute.")
    st.progress(min(1.0, run.num_finished / max(run.num_stages, 1)))
    facts = [f"recipe `{run.recipe_name}`", f"began {look.time_text(run.created_at)}"]
    if run.start_from:
        facts.append(f"from `{run.start_from}`")
    if run.force:
        facts.append("forced")
    facts += [f"`{override}`" for override in run.overrides]
    st.caption(" · ".join(facts))


def _table(states: Sequence[StageState]) -> None:
    st.dataframe(
        [_row(state) for state in states],
        hide_index=True,
        height=560,
        on_select=lambda: _take_click([state.stage for state in states]),
        selection_mode="single-row",
        key=_TABLE,
        column_config={
            "progress": st.column_config.ProgressColumn(
                "progress", min_value=0.0, max_value=1.0, format="percent", width="small"
            ),
            "time": st.column_config.TextColumn("time", width="small"),
            "try": st.column_config.NumberColumn("try", width="small", help="Attempts so far."),
        },
    )


def _row(state: StageState) -> dict[str, Any]:
    info = state.info
    row = {
        "stage": state.stage,
        "status": look.status_text(state.status, state.cached),
        "progress": _progress(state),
        "time": look.seconds_text(_seconds(info)) if info else "",
        "try": info.attempt if info else None,
        "now": info.progress_note if info and state.status == "running" else "",
    }
    return row


def _progress(state: StageState) -> float:
    if state.status == "finished":
        return 1.0
    info = state.info
    return info.progress_done / info.progress_total if info and info.progress_total else 0.0


def _seconds(info: StageRunInfo) -> float:
    """Of this attempt so far, or, for a reused result, of the attempt that made it."""
    if info.status == "running":
        return max(0.0, (datetime.now(UTC) - info.started_at).total_seconds())
    return info.computed_seconds if info.cached else info.seconds


def _take_click(names: Sequence[str]) -> None:
    rows = st.session_state[_TABLE]["selection"]["rows"]
    if rows:
        st.session_state[_STAGE_PICKER] = names[rows[0]]


def _timeline(states: Sequence[StageState]) -> None:
    bars = [
        {
            "stage": state.stage,
            "group": state.stage.split(".")[0],
            "seconds": round(_seconds(state.info), 2),
            "time": look.seconds_text(_seconds(state.info)),
            "reused": state.cached,
        }
        for state in states
        if state.info is not None
    ]
    if not bars:
        st.caption("No stage has started.")
        return
    groups = list(look.GROUP_COLOURS)
    chart = (
        alt.Chart(look.table(bars))
        .mark_bar(cornerRadiusEnd=3)
        .encode(
            x=alt.X("seconds:Q", title="seconds (computing the result)"),
            y=alt.Y(
                "stage:N", sort=None, title=None, axis=alt.Axis(labelLimit=220, labelOverlap=False)
            ),
            color=alt.Color(
                "group:N",
                scale=alt.Scale(domain=groups, range=list(look.GROUP_COLOURS.values())),
                legend=None,
            ),
            opacity=alt.condition("datum.reused", alt.value(0.45), alt.value(1.0)),
            tooltip=["stage:N", "time:N", "reused:N"],
        )
        .properties(height=alt.Step(17))
    )
    with st.container(height=560, border=False):
        st.altair_chart(chart, width="stretch")


def _details(run_id: str, states: Sequence[StageState]) -> None:
    names = [state.stage for state in states]
    if st.session_state.get(_STAGE_PICKER) not in names:
        linked = st.query_params.get(STAGE, "")
        st.session_state[_STAGE_PICKER] = linked if linked in names else _most_telling(states)
    st.subheader("Stage")
    name = st.selectbox("Stage", names, key=_STAGE_PICKER, label_visibility="collapsed")
    st.query_params[STAGE] = name
    state = states[names.index(name)]
    info = state.info
    if info is None:
        st.caption("This stage has not started.")
        return
    _facts(state, info)
    log, figures, artifacts = st.tabs(["Log", "Figures", "Artifacts"])
    with log:
        _log(info.source_run_id or run_id if info.cached else run_id, name, info)
    with figures:
        if info.summary:
            st.json(info.summary, expanded=1)
        else:
            st.caption("The stage writes its figures when it ends.")
    with artifacts:
        _artifacts(info)


def _most_telling(states: Sequence[StageState]) -> str:
    for status in ("failed", "running", "lost", "stopped"):
        for state in states:
            if state.status == status:
                return state.stage
    done = [state.stage for state in states if state.status == "finished"]
    return done[-1] if done else states[0].stage


def _facts(state: StageState, info: StageRunInfo) -> None:
    facts = [look.status_badge(state.status, state.cached), look.seconds_text(_seconds(info))]
    if info.cached:
        facts.append(f"computed in run `{info.source_run_id}`")
    else:
        facts.append(f"attempt {info.attempt} on {info.host} (pid {info.pid})")
    facts.append(f"cache key `{look.short(info.cache_key)}`")
    st.caption(" · ".join(facts))
    if info.error:
        st.error(info.error)
    if state.status == "running" and info.progress_total:
        share = min(1.0, info.progress_done / info.progress_total)
        st.progress(share, f"{info.progress_done} of {info.progress_total}  {info.progress_note}")


def _log(run_id: str, name: str, info: StageRunInfo) -> None:
    try:
        text = data.log_tail(run_id, name)
    except data.UNAVAILABLE as error:
        st.error(str(error))
        return
    if not text:
        st.caption("No log has arrived in the store yet.")
        return
    if info.cached:
        st.caption(f"From run `{run_id}`, which computed this result.")
    st.code("\n".join(text.splitlines()[-200:]), language=None, height=360, wrap_lines=True)


def _artifacts(info: StageRunInfo) -> None:
    rows = [
        {"as": direction, "name": name, "digest": digest, "open": f"/lineage?artifact={digest}"}
        for direction, links in (("input", info.inputs), ("output", info.outputs))
        for name, digest in links.items()
    ]
    if not rows:
        st.caption("None yet.")
        return
    st.dataframe(
        rows,
        hide_index=True,
        column_config={"open": st.column_config.LinkColumn("lineage", display_text="show")},
    )
