"""Page "Data": what came in, what stayed, why the rest went, with samples of both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import streamlit as st

from dashboard import data, look
from dashboard.funnels import Funnel, funnels
from sailyard.lineage import RunInfo, queries
from sailyard.samples import Sample

KEPT = "kept"
SHOWN = 12
# Larger data sets are fetched only when asked for.
FREE_BYTES = 64 * 2**20
KEPT_COLOUR = "#4c9a5b"
# Data sets worth a look, and what their stage threw out, where it keeps that.
GALLERIES: dict[str, tuple[str, str | None]] = {
    "Captions, judged": ("curation.caption2/captions", "curation.caption2/dropped"),
    "Raw captions": ("curation.ingest/captions", None),
    "Charts": ("curation.charts/charts", None),
    "Questions from captions": ("curation.vqa/vqa", None),
    "Video": ("curation.video/video", None),
    "Instructions": ("curation.instruction2/instruction", None),
    "Chains of thought": ("curation.longcot/longcot", None),
    "RL prompts": ("curation.rl_data/prompts", None),
    "Think-Fusion": ("curation.think_fusion/fusion", None),
    "Multi-task mix": ("curation.mix_multitask/mix", None),
    "Held-out questions": ("curation.heldout/heldout", None),
}
QUARANTINE = "curation.ingest/quarantine"


def page(run: RunInfo | None) -> None:
    """Draw the page."""
    look.page_header(
        "Data", "The funnel of every curation stage by reason, and samples of what it kept and not."
    )
    if run is None:
        look.nothing_yet("There is no run yet.", look.HOW_TO_RUN)
        return
    rows = queries.stage_runs(data.yard().database, run.id)
    summaries = {row.stage: row.summary for row in rows if row.status == "finished"}
    made = {f"{row.stage}/{name}": digest for row in rows for name, digest in row.outputs.items()}
    if not made:
        look.nothing_yet("This run has made no data yet.", "Curation is its first group of stages.")
        return
    funnel, mixes, samples, quarantine = st.tabs(["Funnel", "Mixtures", "Samples", "Quarantine"])
    with funnel:
        _funnels(funnels(summaries))
    with mixes:
        _mixes(summaries)
    with samples:
        _galleries(made)
    with quarantine:
        _quarantine(made.get(QUARANTINE))


def _funnels(found: Sequence[Funnel]) -> None:
    if not found:
        st.caption("No curation stage has finished yet.")
        return
    bars = [
        {"stage": funnel.stage, "fate": fate, "share": count / funnel.came, "count": count}
        for funnel in found
        if funnel.came
        for fate, count in ((KEPT, funnel.kept), ("dropped", funnel.dropped))
    ]
    chart = (
        alt.Chart(look.table(bars))
        .mark_bar()
        .encode(
            x=alt.X("share:Q", title=None, axis=alt.Axis(format="%", tickCount=5)),
            y=alt.Y("stage:N", sort=None, title=None, axis=alt.Axis(labelLimit=220)),
            color=alt.Color(
                "fate:N",
                scale=alt.Scale(domain=[KEPT, "dropped"], range=[KEPT_COLOUR, "#c8453b"]),
                legend=alt.Legend(orient="top", title=None),
            ),
            order=alt.Order("fate:N", sort="descending"),
            tooltip=["stage:N", "fate:N", "count:Q", alt.Tooltip("share:Q", format=".1%")],
        )
        .properties(height=alt.Step(28))
    )
    st.altair_chart(chart, width="stretch")
    for start in range(0, len(found), 2):
        for column, funnel in zip(
            st.columns(2, gap="medium"), found[start : start + 2], strict=False
        ):
            with column, st.container(border=True):
                _one(funnel)


def _one(funnel: Funnel) -> None:
    st.markdown(f"**{funnel.stage}**")
    share = funnel.kept / funnel.came if funnel.came else 0.0
    st.caption(f"{funnel.came:,} {funnel.unit} came, {funnel.kept:,} stayed ({share:.1%})")
    if not funnel.reasons:
        st.caption("Nothing was dropped.")
        return
    rows = [{"reason": look.label(name), "count": count} for name, count in funnel.reasons.items()]
    chart = (
        alt.Chart(look.table(rows))
        .mark_bar(cornerRadiusEnd=3, color="#c8453b", opacity=0.8)
        .encode(
            x=alt.X("count:Q", title=None, axis=alt.Axis(tickMinStep=1, tickCount=5)),
            y=alt.Y("reason:N", sort="-x", title=None, axis=alt.Axis(labelLimit=260)),
            tooltip=["reason:N", "count:Q"],
        )
        .properties(height=alt.Step(22))
    )
    st.altair_chart(chart, width="stretch")


def _mixes(summaries: Mapping[str, Mapping[str, Any]]) -> None:
    names = [name for name in summaries if name.startswith("curation.mix_")]
    if not names:
        st.caption("No mixture is made yet.")
        return
    rows = [
        {
            "mix": name.removeprefix("curation.mix_"),
            "input": source.partition("/")[0],
            "source": source,
            **counts,
        }
        for name in names
        for source, counts in summaries[name].get("sources", {}).items()
    ]
    chart = (
        alt.Chart(look.table(rows))
        .mark_bar()
        .encode(
            x=alt.X("drawn:Q", title="samples drawn", stack="zero"),
            y=alt.Y("mix:N", sort=None, title=None),
            color=alt.Color("input:N", legend=alt.Legend(orient="top", title=None)),
            detail="source:N",
            tooltip=["mix:N", "source:N", "drawn:Q", "available:Q"],
        )
        .properties(height=alt.Step(32))
    )
    st.altair_chart(chart, width="stretch")
    balanced = {name: summaries[name].get("ngram_entropy") for name in names}
    rows = [
        {
            "mix": name.removeprefix("curation.mix_"),
            "n-gram": size,
            "entropy before": f"{value:.3f}",
            "after": f"{entropy['after'].get(size, float('nan')):.3f}",
        }
        for name, entropy in balanced.items()
        if entropy
        for size, value in entropy["before"].items()
    ]
    if rows:
        st.subheader("n-gram balance")
        st.dataframe(rows, hide_index=True)


def _galleries(made: Mapping[str, str]) -> None:
    present = {title: pair for title, pair in GALLERIES.items() if pair[0] in made}
    if not present:
        st.caption("No data set is made yet.")
        return
    title = st.pills(
        "Data set", list(present), default=next(iter(present)), key="data gallery"
    ) or next(iter(present))
    kept, dropped = present[title]
    sides = [(kept, "Kept"), (dropped, "Dropped")] if dropped in made else [(kept, "")]
    for column, (name, heading) in zip(st.columns(len(sides), gap="medium"), sides, strict=True):
        with column:
            if heading:
                st.subheader(heading)
            _gallery(made[str(name)], across=2 if heading else 4)


def _gallery(digest: str, across: int) -> None:
    try:
        size = data.artifact(digest).size
        if size > FREE_BYTES and not st.button(
            f"Fetch {look.size_text(size)} to show samples", key=f"fetch {digest}"
        ):
            return
        samples = data.first_samples(digest, SHOWN)
    except data.UNAVAILABLE as error:
        st.error(str(error))
        return
    if not samples:
        st.caption("Empty.")
    for start in range(0, len(samples), across):
        for column, sample in zip(
            st.columns(across), samples[start : start + across], strict=False
        ):
            with column, st.container(border=True):
                _card(sample)


def _card(sample: Sample) -> None:
    if len(sample.images) > 1:
        st.image(list(sample.images[:8]), width=72)
    elif sample.images:
        st.image(sample.images[0], width="stretch")
    st.caption(f"{sample.source} · {sample.task} · `{sample.id}`")
    for message in sample.messages[:4]:
        text = message["content"].replace("<image>\n", "").strip()
        who = "" if message["role"] == "assistant" else "**Q** "
        if text:
            st.markdown(f"{who}{_plain(text)}")
    if reasons := sample.meta.get("dropped_because"):
        st.markdown(" ".join(f":red-badge[{_plain(str(reason))}]" for reason in reasons))
    if judged := sample.meta.get("judged"):
        st.caption(f"ITA {judged.get('ita')} · VIR {judged.get('vir')}")
    if quality := sample.meta.get("quality"):
        st.caption(f"made as: {quality}")


def _plain(text: str, limit: int = 280) -> str:
    """Text as itself: nothing in it is taken for markup."""
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    for mark in "\\`*_[]<>#$~:|":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("\n", "  \n")


def _quarantine(digest: str | None) -> None:
    if digest is None:
        st.caption("Ingestion has not finished.")
        return
    try:
        folder = data.folder(digest)
    except data.UNAVAILABLE as error:
        st.error(str(error))
        return
    rows = [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()[:500]
    ]
    st.caption("Items that could not be used: none is lost silently, none stops a run.")
    if rows:
        st.dataframe(rows, hide_index=True, width="stretch")
    else:
        st.success("Nothing was broken.")
