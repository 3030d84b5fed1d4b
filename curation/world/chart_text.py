"""Captions of charts and questions about them, in English and Chinese."""

from __future__ import annotations

import numpy as np

from curation.world.plots import EXTREME_KINDS, KIND_NAMES, MARKS, Chart
from curation.world.questions import QA
from curation.world.scene import pick

EXTREME_WORDS = {"pie": "largest", "heatmap": "darkest"}
_ZH_NAMES = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色",
    "black": "黑色", "top left": "左上", "top right": "右上", "bottom left": "左下",
    "bottom right": "右下",
}  # fmt: skip
_ZH_KINDS = {
    "bar": "柱状图", "row": "条形图", "line": "折线图", "pie": "饼图", "scatter": "散点图",
    "area": "面积图", "histogram": "直方图", "heatmap": "热力图", "box": "箱线图",
}  # fmt: skip
_ZH_MARKS = {"bar": "柱", "point": "点", "slice": "扇区", "cell": "格", "box": "箱"}
PROMPTS = {
    "en": ("Describe the chart.", "What does the chart show?"),
    "zh": ("描述这张图表。", "这张图表显示了什么？"),
}


def caption_chart(chart: Chart, language: str = "en") -> str:
    """Every mark with its value; of pies and heatmaps, the mark that stands out."""
    if language == "zh":
        return _caption_zh(chart)
    mark, name = MARKS[chart.kind], KIND_NAMES[chart.kind]
    article = "an" if name[0] in "aeiou" else "a"
    if chart.kind == "heatmap":
        extreme = f"the {chart.largest()} cell is the darkest"
        return f"{article} {name} with {len(chart.marks)} cells, {extreme}"
    if chart.kind == "pie":
        marks = ", ".join(f"a {c} slice" for c in chart.marks)
        return f"{article} {name} with {marks}, the {chart.largest()} slice is the largest"
    marks = ", ".join(
        f"a {c} {mark} at {v}" for c, v in zip(chart.marks, chart.values, strict=True)
    )
    return f"{article} {name} with {marks}"


def _caption_zh(chart: Chart) -> str:
    mark, name = _ZH_MARKS[MARKS[chart.kind]], _ZH_KINDS[chart.kind]
    if chart.kind in EXTREME_KINDS:
        word = "颜色最深" if chart.kind == "heatmap" else "最大"
        return f"{name}：共{len(chart.marks)}个{mark}，{_ZH_NAMES[chart.largest()]}{mark}{word}"
    marks = "，".join(
        f"{_ZH_NAMES[c]}{mark}为{v}" for c, v in zip(chart.marks, chart.values, strict=True)
    )
    return f"{name}：{marks}"


def ask_chart(chart: Chart, rng: np.random.Generator) -> QA:
    """The value of a mark named by its colour; of pies and heatmaps, the mark that stands out."""
    mark = MARKS[chart.kind]
    if chart.kind in EXTREME_KINDS:
        word = EXTREME_WORDS[chart.kind]
        question = pick(rng, (f"Which {mark} is the {word}?", f"Name the {word} {mark}."))
        chain = f"I compare the {mark}s. The {word} is {chart.largest()}."
        return QA(question, chart.largest(), "exact", "chart", f"chart.{word}", chain)
    i = int(rng.random() * len(chart.values))
    name = f"the {chart.marks[i]} {mark}"
    question = pick(rng, (
        f"What is the value of {name}?", f"Which value does {name} have?",
        f"Read the value of {name}.",
    ))  # fmt: skip
    value = str(chart.values[i])
    chain = f"On the axis {name} stands at {value}."
    return QA(question, value, "number", "chart", f"chart.{chart.kind}", chain)


def ask_chart_extra(chart: Chart) -> list[QA]:
    """Number of marks, kind of chart and highest mark, beside the values."""
    mark = MARKS[chart.kind]
    out = [
        QA(f"How many {mark}s are there?" if mark != "box" else "How many boxes are there?",
           str(len(chart.values)), "number", "chart", "chart.marks"),
        QA("What kind of chart is this?", KIND_NAMES[chart.kind], "exact", "chart", "chart.kind"),
    ]  # fmt: skip
    if chart.kind not in EXTREME_KINDS and chart.values.count(max(chart.values)) == 1:
        question = f"Which {mark} has the largest value?"
        out.append(QA(question, chart.largest(), "exact", "chart", "chart.top"))
    return out


def chart_questions(chart: Chart, rng: np.random.Generator, num: int) -> list[QA]:
    """Up to `num` different English questions, at least half of them about values."""
    values = {qa.question: qa for qa in (ask_chart(chart, rng) for _ in range(2 * num))}
    about_values = list(values.values())[: max(1, num - num // 2)]
    extra = ask_chart_extra(chart)
    order = [extra[int(i)] for i in rng.permutation(len(extra))]
    return [*about_values, *order][:num]


def chart_questions_zh(chart: Chart, rng: np.random.Generator, num: int) -> list[QA]:
    """Up to `num` different Chinese questions."""
    mark, kind = _ZH_MARKS[MARKS[chart.kind]], chart.kind
    out = [
        QA("这是什么图表？", _ZH_KINDS[kind], "exact", "chart", "chart.kind"),
        QA(f"图中有几个{mark}？", str(len(chart.values)), "number", "chart", "chart.marks"),
    ]
    if kind in EXTREME_KINDS:
        word = "颜色最深" if kind == "heatmap" else "最大"
        name = _ZH_NAMES[chart.largest()]
        out.append(
            QA(f"哪个{mark}{word}？", name, "exact", "chart", f"chart.{EXTREME_WORDS[kind]}")
        )
    else:
        out += [
            QA(f"{_ZH_NAMES[c]}{mark}的值是多少？", str(v), "number", "chart", f"chart.{kind}")
            for c, v in zip(chart.marks, chart.values, strict=True)
        ]
    return [out[int(i)] for i in rng.permutation(len(out))[:num]]
