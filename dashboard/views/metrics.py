"""Page "Metrics": the curves of a stage, over one run or several."""

from __future__ import annotations

from typing import Any

import altair as alt
import streamlit as st

from dashboard import data, look
from sailyard.lineage import RunInfo, queries

REFRESH_SECONDS = 5.0
# Most telling first; a stage offers what it has.
FAVOURITES = (
    "loss",
    "reward",
    "accuracy",
    "lr",
    "grad_norm",
    "answer_reward",
    "format_reward",
    "tokens_per_second",
)
MAX_RUNS = 6
COLUMNS = 2


def page(run: RunInfo | None) -> None:
    """Draw the page."""
    look.page_header("Metrics", "Curves that stages write while they run. Compare runs by name.")
    if run is None:
        look.nothing_yet("There is no run yet.", look.HOW_TO_RUN)
        return
    live = run.status in ("running", "created")
    st.fragment(_body, run_every=REFRESH_SECONDS if live else None)(run.id)


def _body(run_id: str) -> None:
    database = data.yard().database
    names = {
        each.stage: found
        for each in queries.stage_runs(database, run_id)
        if (found := queries.metric_names(database, run_id, each.stage))
    }
    if not names:
        look.nothing_yet(
            "No curve yet.", "Training, reinforcement and evaluation stages write them."
        )
        return
    left, middle, right = st.columns([2, 3, 2])
    stage = left.selectbox("Stage", list(names), index=_newest(names), key="metrics stage")
    others = [each.id for each in data.runs() if each.id != run_id]
    compared = middle.multiselect(
        "Compare with", others, max_selections=MAX_RUNS - 1, key="metrics runs"
    )
    with right:
        smooth = st.slider("Smoothing", 0.0, 0.99, 0.0, 0.01, key="metrics smoothing")
        log_scale = st.toggle("Logarithmic", key="metrics log")
    shown = st.multiselect(
        "Series",
        names[stage],
        default=_favourites(names[stage]),
        key=f"metrics series {stage}",
    )
    charts = [
        _chart(name, [run_id, *compared], stage, smooth, log_scale) for name in sorted_names(shown)
    ]
    for start in range(0, len(charts), COLUMNS):
        for column, chart in zip(
            st.columns(COLUMNS), charts[start : start + COLUMNS], strict=False
        ):
            with column:
                st.altair_chart(chart, width="stretch")


def _newest(names: dict[str, list[str]]) -> int:
    """The last stage that trains something, else the last one."""
    trained = [place for place, found in enumerate(names.values()) if {"loss", "reward"} & {*found}]
    return trained[-1] if trained else len(names) - 1


def sorted_names(names: list[str]) -> list[str]:
    """Favourites in their order, then the rest by name."""
    rank = {name: place for place, name in enumerate(FAVOURITES)}
    return sorted(names, key=lambda name: (rank.get(name.split("/")[-1], len(rank)), name))


def _favourites(names: list[str]) -> list[str]:
    return sorted_names(names)[:4]


def smoothed(points: list[tuple[int, float | None]], weight: float) -> list[float | None]:
    """Exponential moving average, corrected for its start; NaN points stay gaps."""
    average, mass = 0.0, 0.0
    result: list[float | None] = []
    for _, value in points:
        if value is None:
            result.append(None)
            continue
        average = weight * average + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        result.append(average / mass)
    return result


def _chart(
    name: str, run_ids: list[str], stage: str, smooth: float, log_scale: bool
) -> alt.LayerChart | alt.FacetChart:
    rows: list[dict[str, Any]] = []
    for run_id in run_ids:
        series = queries.metric_series(data.yard().database, run_id, stage, [name])
        points = series.get(name, [])
        for (step, value), mean in zip(points, smoothed(points, smooth), strict=True):
            rows.append({"run": run_id, "step": step, "value": value, "smoothed": mean})
    scale = alt.Scale(type="symlog" if log_scale else "linear", zero=False)
    base = alt.Chart(look.table(rows)).encode(
        x=alt.X("step:Q", title="step", axis=alt.Axis(tickMinStep=1, format="d")),
        color=alt.Color(
            "run:N",
            legend=alt.Legend(orient="bottom", title=None, labelLimit=320)
            if len(run_ids) > 1
            else None,
        ),
        tooltip=["run:N", "step:Q", alt.Tooltip("value:Q", format=".5g")],
    )
    raw = base.mark_line(opacity=0.25 if smooth else 0.0, strokeWidth=1).encode(
        y=alt.Y("value:Q", title=None, scale=scale)
    )
    line = base.mark_line(strokeWidth=2, point=len(rows) < 60).encode(
        y=alt.Y("smoothed:Q", title=None, scale=scale)
    )
    return alt.layer(raw, line).properties(title=look.label(name), height=240).interactive()
