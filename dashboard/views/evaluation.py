"""Page "Evaluation": accuracy per skill and checkpoint, the paper's numbers, real replies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import streamlit as st

from dashboard import data, look
from sailyard.lineage import RunInfo
from sailyard.pipeline import EVALUATED
from sailyard.report import build_report
from sailyard.samples import SKILLS

STAGE = "evaluation.suite"
Report = Mapping[str, Any]


def page(run: RunInfo | None) -> None:
    """Draw the page."""
    look.page_header(
        "Evaluation",
        "Held-out questions, greedy answers, rule-checked. The dashed line is what always giving "
        "the commonest answer would score.",
    )
    if run is None:
        look.nothing_yet("There is no run yet.", look.HOW_TO_RUN)
        return
    digest = data.output(run.id, STAGE, "report")
    if digest is None:
        look.nothing_yet(
            "This run has no evaluation yet.",
            "`evaluation.suite` runs after the last training stage.",
        )
        return
    try:
        report = in_order(data.read_json(digest, "report.json"))
    except data.UNAVAILABLE as error:
        st.error(str(error))
        return
    _headline(report)
    skills, paper, replies, conditions = st.tabs(
        ["Per skill", "Beside the paper", "Replies", "Conditions"]
    )
    with skills:
        _progression(report)
        _heatmap(report)
        _skill_bars(report)
    with paper:
        _paper(report, run.id)
    with replies:
        _replies(report, digest)
    with conditions:
        _conditions(report)


def in_order(report: Report) -> dict[str, Any]:
    """The report with checkpoints as the pipeline makes them and skills as the world lists them;
    the file itself is sorted by name."""
    places = [name.partition(".")[2] for name in EVALUATED]

    def sort(table: Mapping[str, Any], order: Sequence[str]) -> dict[str, Any]:
        rank = {name: place for place, name in enumerate(order)}
        return dict(sorted(table.items(), key=lambda item: (rank.get(item[0], len(rank)), item[0])))

    checkpoints = {
        name: {
            **entry,
            "modes": {
                mode: {**figures, "skills": sort(figures["skills"], SKILLS)}
                for mode, figures in entry["modes"].items()
            },
        }
        for name, entry in sort(report["checkpoints"], places).items()
    }
    examples = [
        {**example, "replies": sort(example["replies"], places)}
        for example in report.get("examples", [])
    ]
    return {**report, "checkpoints": checkpoints, "examples": examples}


def _headline(report: Report) -> None:
    checkpoints = report["checkpoints"]
    name, final = list(checkpoints.items())[-1]
    first_name, first = next(iter(checkpoints.items()))
    columns = st.columns(4)
    columns[0].metric(
        f"Final ({look.label(name)})",
        f"{final['accuracy']:.3f}",
        f"{final['accuracy'] - first['accuracy']:+.3f} since {look.label(first_name)}",
        help="Mean over skills of the share answered right, direct mode.",
    )
    columns[1].metric(
        "With thinking",
        f"{final['accuracy_thinking']:.3f}",
        help="Reasoning skills think first; the others answer directly.",
    )
    columns[2].metric("Majority class", f"{report['baseline']['overall']:.3f}")
    columns[3].metric(
        "Least lead over it",
        f"{final['least_margin']:+.3f}",
        help="The worst skill's accuracy minus its majority-class baseline.",
    )


def accuracy_rows(report: Report, mode: str = "direct") -> list[dict[str, Any]]:
    """One row per checkpoint and skill that the mode covers, in the report's order."""
    floor = report["baseline"]["skills"]
    return [
        {
            "checkpoint": look.label(name),
            "skill": skill,
            "accuracy": value,
            "baseline": floor.get(skill),
            "lead": value - floor.get(skill, 0.0),
        }
        for name, entry in report["checkpoints"].items()
        for skill, value in entry["modes"].get(mode, {}).get("skills", {}).items()
    ]


def _progression(report: Report) -> None:
    rows = [
        {"checkpoint": look.label(name), "mode": mode, "accuracy": entry[key]}
        for name, entry in report["checkpoints"].items()
        for mode, key in (("direct", "accuracy"), ("with thinking", "accuracy_thinking"))
        if mode == "direct" or "thinking" in entry["modes"]
    ]
    base = alt.Chart(look.table(rows)).encode(
        x=alt.X("checkpoint:N", sort=None, title=None, axis=alt.Axis(labelAngle=-30)),
        y=alt.Y("accuracy:Q", title="accuracy", scale=alt.Scale(domain=[0, 1])),
        color=alt.Color("mode:N", legend=alt.Legend(orient="top", title=None)),
        tooltip=["checkpoint:N", "mode:N", alt.Tooltip("accuracy:Q", format=".3f")],
    )
    floor = (
        alt.Chart(look.table([{"majority": report["baseline"]["overall"]}]))
        .mark_rule(strokeDash=[6, 4], color="#6c7a83")
        .encode(y="majority:Q", tooltip=[alt.Tooltip("majority:Q", format=".3f")])
    )
    st.subheader("From pretraining to release")
    chart = alt.layer(base.mark_line(), base.mark_point(filled=True, size=70), floor)
    st.altair_chart(chart.properties(height=380), width="stretch")


def _heatmap(report: Report) -> None:
    rows = accuracy_rows(report)
    base = alt.Chart(look.table(rows)).encode(
        x=alt.X("skill:N", sort=None, title=None, axis=alt.Axis(labelAngle=0, orient="top")),
        y=alt.Y("checkpoint:N", sort=None, title=None),
        tooltip=[
            "checkpoint:N",
            "skill:N",
            alt.Tooltip("accuracy:Q", format=".3f"),
            alt.Tooltip("baseline:Q", format=".3f", title="majority class"),
            alt.Tooltip("lead:Q", format="+.3f"),
        ],
    )
    cells = base.mark_rect(cornerRadius=3, stroke="white").encode(
        color=alt.Color(
            "lead:Q",
            scale=alt.Scale(
                domain=[-0.6, 0, 0.8],
                range=["#c8453b", "#f4f6f7", "#0f6d8c"],
                interpolate="rgb",
                clamp=True,
            ),
            legend=alt.Legend(
                title="lead over majority class", orient="bottom", gradientLength=240
            ),
        )
    )
    texts = base.mark_text(fontSize=12).encode(
        text=alt.Text("accuracy:Q", format=".2f"),
        color=alt.condition("abs(datum.lead) > 0.45", alt.value("white"), alt.value("#17242d")),
    )
    st.subheader("Skill by skill")
    st.altair_chart(alt.layer(cells, texts).properties(height=alt.Step(30)), width="stretch")


def _skill_bars(report: Report) -> None:
    names = list(report["checkpoints"])
    name = st.selectbox(
        "Checkpoint",
        names,
        index=len(names) - 1,
        format_func=look.label,
        key="evaluation checkpoint",
    )
    rows = [
        {"skill": row["skill"], "who": who, "accuracy": row[key]}
        for row in accuracy_rows(report)
        if row["checkpoint"] == look.label(name)
        for who, key in (("model", "accuracy"), ("majority class", "baseline"))
    ]
    rows += [
        {"skill": row["skill"], "who": "model, thinking", "accuracy": row["accuracy"]}
        for row in accuracy_rows(report, "thinking")
        if row["checkpoint"] == look.label(name)
    ]
    order = ["model", "model, thinking", "majority class"]
    chart = (
        alt.Chart(look.table(rows))
        .mark_bar(cornerRadiusEnd=3)
        .encode(
            x=alt.X("skill:N", sort=None, title=None, axis=alt.Axis(labelAngle=0)),
            xOffset=alt.XOffset("who:N", sort=order),
            y=alt.Y("accuracy:Q", title="accuracy", scale=alt.Scale(domain=[0, 1])),
            color=alt.Color(
                "who:N",
                scale=alt.Scale(domain=order, range=["#0f6d8c", "#d9822b", "#b9c6cd"]),
                legend=alt.Legend(orient="top", title=None),
            ),
            tooltip=["skill:N", "who:N", alt.Tooltip("accuracy:Q", format=".3f")],
        )
        .properties(height=320)
    )
    st.altair_chart(chart, width="stretch")


def _paper(report: Report, run_id: str) -> None:
    st.caption(
        "The paper's scores come from another harness on other data and far larger models: they "
        "are context, not a target for a small run. What can be compared is the shape: judges, "
        "distances that fall, a soup at least as good as its ingredients."
    )
    own = build_report(data.yard(), run_id)
    paper = report.get("paper", {})
    left, right = st.columns(2, gap="medium")
    with left:
        st.subheader("Judges (Table 2)")
        _judges(own["judges"], paper.get("judges", {}))
    with right:
        st.subheader("Alignment distances (Table 7)")
        _distances(own["alignment"]["overall"], paper.get("alignment", {}))
    st.subheader("OpenCompass (Tables 8 and 9), and our held-out mean")
    _benchmarks(report, paper.get("opencompass", {}), "accuracy")
    st.subheader("Reasoning (Table 10), and our held-out mean with thinking")
    _benchmarks(report, paper.get("reasoning", {}), "accuracy_thinking")


def _judges(own: Mapping[str, Any], paper: Mapping[str, Any]) -> None:
    _grid(
        [
            {
                "judge": look.label(name)
                .upper()
                .replace("SCORE", "score")
                .replace("YORN", "yes/no"),
                "our precision": _figure(figures["precision"]),
                "paper's": _figure(_at(paper, name, 0)),
                "our recall": _figure(figures["recall"]),
                "paper's ": _figure(_at(paper, name, 1)),
            }
            for name, figures in own.items()
        ]
    )


def _distances(own: Mapping[str, Any], paper: Mapping[str, Any]) -> None:
    rows = [{"model": "this run", **_changes(own)}]
    for model, figures in paper.items():
        changes = {
            name: {"before": pair[0], "after": pair[1], "reduction": 1 - pair[1] / pair[0]}
            for name, pair in figures.items()
        }
        rows.append({"model": f"paper, {model}", **_changes(changes)})
    _grid(rows)


def _changes(figures: Mapping[str, Any]) -> dict[str, str]:
    return {
        look.label(name): f"{d['before']:.2f} → {d['after']:.2f} ({-d['reduction']:+.0%})"
        if d.get("reduction") is not None
        else "–"
        for name, d in figures.items()
    }


def _benchmarks(report: Report, paper: Mapping[str, Any], key: str) -> None:
    name, final = list(report["checkpoints"].items())[-1]
    rows = [{"model": f"this run, {look.label(name)}", "average": f"{100 * final[key]:.1f}"}]
    rows += [
        {"model": f"paper, {model}", **{bench: f"{score:.1f}" for bench, score in scores.items()}}
        for model, scores in paper.items()
    ]
    _grid(rows)


def _grid(rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    st.dataframe([{name: row.get(name, "–") for name in columns} for row in rows], hide_index=True)


def _replies(report: Report, digest: str) -> None:
    examples = report.get("examples", [])
    if not examples:
        st.caption("The report keeps no examples.")
        return
    skills = list(dict.fromkeys(example["skill"] for example in examples))
    skill = st.pills("Skill", skills, default=skills[0], key="evaluation skill")
    folder = data.folder(digest)
    for example in (each for each in examples if each["skill"] == skill):
        with st.container(border=True):
            picture, table = st.columns([1, 3], gap="medium")
            picture.image(str(folder / example["image"]), width="stretch")
            with table:
                st.markdown(f"**{example['question']}**  \nexpected: `{example['answer']}`")
                st.dataframe(
                    [
                        {
                            "checkpoint": look.label(name),
                            "mode": mode,
                            "": "✓" if outcome["right"] else "✗",
                            "reply": outcome["reply"],
                        }
                        for name, modes in example["replies"].items()
                        for mode, outcome in modes.items()
                    ],
                    hide_index=True,
                    column_config={"reply": st.column_config.TextColumn(width="large")},
                )


def _conditions(report: Report) -> None:
    st.caption("A score means nothing without these; they are stored with it.")
    harness, heldout = report["harness"], report["heldout"]
    _grid(
        [
            {"what": "harness", "value": f"{harness['name']} version {harness['version']}"},
            {"what": "prompt hash", "value": report["prompt_hash"]},
            {"what": "held-out set", "value": heldout["digest"]},
            {"what": "questions", "value": str(heldout["questions"])},
            *(
                {"what": f"token budget, {mode}", "value": str(budget)}
                for mode, budget in report["token_budget"].items()
            ),
        ]
    )
    st.dataframe(
        [
            {
                "checkpoint": look.label(name),
                "mode": mode,
                "mean tokens": round(figures["mean_tokens"], 1),
                "cut off": f"{figures['unfinished']:.1%}",
                "well-formed thoughts": _figure(figures.get("format_rate")),
            }
            for name, entry in report["checkpoints"].items()
            for mode, figures in entry["modes"].items()
        ],
        hide_index=True,
    )


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _at(table: Mapping[str, Any], name: str, place: int) -> float | None:
    pair = table.get(name)
    return float(pair[place]) if pair else None
