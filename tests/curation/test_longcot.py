"""Chains of thought: cleaning, every filter, the length histogram."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from curation import longcot
from curation.longcot import (
    Task,
    Written,
    balance_lengths,
    clean_question,
    distil,
    overlap,
    parse_reply,
    tasks_of,
    write_chain,
)
from curation.world.sources import prompt_pool, raw_instructions
from model.chat import SHORT_ANSWER_SUFFIX, THINKING_SUFFIX
from sailyard.recipe import load_recipe
from sailyard.samples import Sample, read_samples, write_samples
from sailyard.stage.context import StageContext, local_context


def task(chain: str = "I see one. That is 1.", answer: str = "1") -> Task:
    return Task(Sample("s", "x", "count", []), "How many?", answer, chain, "count", "number")


def test_hints_that_contradict_a_chain_are_dropped() -> None:
    assert clean_question("How many?" + SHORT_ANSWER_SUFFIX) == "How many?"
    assert clean_question(f"How many?\n{THINKING_SUFFIX}") == "How many?"
    assert clean_question("Pick one.\nA. 3\nB. 4") == "Pick one.\nA. 3\nB. 4"


def test_system_turns_go_and_every_question_gets_its_images() -> None:
    known = {"answer": "3", "chain": "That is 3.", "skill": "count", "check": "number"}
    messages = [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "<image>\nHow many?" + SHORT_ANSWER_SUFFIX},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "And circles?"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
    ]
    unknown = {"answer": "So.", "skill": "count", "check": "open"}
    sample = Sample(
        "s", "x", "mixed", messages, [b"png"], meta={"questions": [known, known, unknown]}
    )
    questions = [t.question for t in tasks_of(sample)]
    assert questions == ["<image>\nHow many?", "<image>\nAnd circles?"]
    assert list(tasks_of(Sample("s", "x", "mixed", messages, [b"png"]))) == []


@pytest.mark.parametrize(
    ("reply", "parsed"),
    [
        ("<think>one and one</think>\n\\boxed{2}", ("one and one", "2")),
        ("<think>so <box>(1,2),(3,4)</box></think>\\boxed{x}", ("so <box>(1,2),(3,4)</box>", "x")),
        ("<think>never closed\n\\boxed{2}", None),
        ("<think>a</think><think>b</think>\\boxed{2}", None),
        ("<think></think>\\boxed{2}", None),
        ("<think>a</think>\n2", None),
        ("first <think>a</think>\\boxed{2}", None),
        ("<think>a</think>\\boxed{}", None),
    ],
)
def test_format_validation(reply: str, parsed: tuple[str, str] | None) -> None:
    assert parse_reply(reply) == parsed


def test_distillation_shortens_only_what_holds_the_truth() -> None:
    assert distil("The answer is 12.", "12") == "12"
    assert distil("The answer is 12.", "1") == "The answer is 12."
    assert distil("unknown", "12") == "unknown"
    assert distil("It is the top left.", "top left") == "top left"


def test_overlap_is_high_only_for_empty_talk() -> None:
    assert overlap("12 12.", "12") == 1.0
    assert overlap("", "12") == 1.0
    assert overlap("The left digit is 7. The right digit is 5. 7 + 5 = 12.", "12") < 0.2


def test_the_writer_errs_as_often_as_stated() -> None:
    rng = np.random.default_rng(0)
    replies = [write_chain(task(), rng) for _ in range(3000)]
    malformed = np.mean([parse_reply(r) is None for r in replies])
    assert malformed == pytest.approx(0.06, abs=0.015)


def test_lengths_are_balanced_as_far_as_bins_allow() -> None:
    rng = np.random.default_rng(1)
    lengths = [5] * 500 + [15] * 60 + [25] * 10
    written = [Written(task(), "word " * n, "1") for n in lengths]
    kept, report = balance_lengths(written, 90, 3, rng)
    assert len(kept) == 90
    assert [r["after"] for r in report] == [40, 40, 10]
    assert [r["before"] for r in report] == [500, 60, 10]
    assert report[0]["from"] == 5
    assert report[-1]["to"] == 25
    assert balance_lengths([], 10, 3, rng) == ([], [])
    assert len(balance_lengths(written, 10_000, 3, rng)[0]) == 570


def _context(tmp_path: Path, name: str, skills: str = "[]") -> StageContext:
    pool = list(prompt_pool(120, np.random.default_rng(2), 84))
    pool.append(replace(pool[0], id="twin"))
    inputs = {
        "rl_pool": pool,
        "instruction": list(raw_instructions(60, np.random.default_rng(3), 84, 0.5)),
    }
    folders = {key: tmp_path / "in" / key for key in inputs}
    for key, folder in folders.items():
        if not folder.exists():
            write_samples(folder, inputs[key])
    overrides = ["curation.longcot.num_samples=80", f"curation.longcot.skills={skills}"]
    recipe = load_recipe("micro", overrides)
    return local_context(tmp_path / name, recipe, "curation.longcot", folders)


def test_the_stage_keeps_sound_chains_and_accounts_for_every_question(tmp_path: Path) -> None:
    ctx = _context(tmp_path, "a")
    longcot.run(ctx)
    samples = list(read_samples(ctx.output("longcot")))
    summary = SimpleNamespace(**ctx.summary_values)
    assert len(samples) == summary.num_samples == 80
    funnel = Counter(summary.funnel)
    assert funnel["duplicate"] >= 1
    lost = sum(funnel[k] for k in ("duplicate", "malformed", "wrong", "redundant", "unbalanced"))
    assert funnel["questions"] == lost + 80
    assert sum(b["after"] for b in summary.lengths) == 80
    for sample in samples:
        question, reply = (m["content"] for m in sample.messages)
        assert question.endswith("\n" + THINKING_SUFFIX)
        assert SHORT_ANSWER_SUFFIX.strip() not in question
        assert re.fullmatch(r"<think>.+</think>\n\\boxed\{.+\}", reply, re.DOTALL)
        assert reply.endswith(f"\\boxed{{{sample.meta['answer']}}}")
        assert sample.meta["think"] is True
    again = _context(tmp_path, "b")
    longcot.run(again)
    assert list(read_samples(again.output("longcot"))) == samples


def test_only_the_named_skills_get_chains(tmp_path: Path) -> None:
    ctx = _context(tmp_path, "a", "[sum]")
    longcot.run(ctx)
    assert {s.meta["skill"] for s in read_samples(ctx.output("longcot"))} == {"sum"}
    assert ctx.summary_values["funnel"]["one look"] > 0
