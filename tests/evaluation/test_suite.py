"""The suite: scoring, prompt hash, and the stage on two real checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from evaluation import suite
from evaluation.routing import router_health
from model.chat import THINKING_SUFFIX
from model.generation import Completion, Prompt
from sailyard.media import decode_image
from sailyard.recipe import load_recipe
from sailyard.samples import SKILLS
from sailyard.stage import local_context
from tests.evaluation.tiny import heldout, micro_recipe, pool, save_tiny, tiny_model, write


def answer(text: str, finished: bool = True) -> Completion:
    return Completion(text, [1, 2, 3], [0.0] * 3, finished)


def test_questions_hide_their_answers(tmp_path: Path) -> None:
    questions = suite.load_questions(heldout(tmp_path / "heldout", 3), per_skill=2)
    assert len(questions) == 2 * len(SKILLS)
    assert all(question.messages[-1]["role"] == "user" for question in questions)
    assert not any("<image>" in question.text for question in questions)
    thinking = questions[0].asked(suite.THINKING)[-1]["content"]
    assert thinking.endswith("\n" + THINKING_SUFFIX)
    assert THINKING_SUFFIX not in questions[0].asked(suite.DIRECT)[-1]["content"]


def test_an_item_without_its_answer_is_named(tmp_path: Path) -> None:
    samples = pool(1, skills=("colour",))
    del samples[0].meta["answer"]
    with pytest.raises(suite.HeldoutError, match=r"pool-colour-0000.*answer"):
        suite.load_questions(write(tmp_path / "bad", samples), 1)


def test_scores_follow_the_rules(tmp_path: Path) -> None:
    items = write(tmp_path / "items", pool(2, skills=("sum",)))
    questions = suite.load_questions(items, 2)
    right = [answer(f"<think>x</think>\\boxed{{{q.answer}}}") for q in questions]
    result = suite.score(questions, [right[0], answer("unfinished", False)], suite.THINKING)
    assert result.accuracy == {"sum": 0.5}
    assert result.format_rate == 0.5
    assert result.unfinished == 0.5
    assert result.mean_tokens == 3


def test_the_prompt_hash_depends_on_prompts_only(tmp_path: Path) -> None:
    questions = suite.load_questions(write(tmp_path / "a", pool(2)), 9)
    again = suite.load_questions(write(tmp_path / "b", pool(2)), 9)
    assert suite.prompt_hash(questions, "") == suite.prompt_hash(again, "")
    assert suite.prompt_hash(questions, "") != suite.prompt_hash(questions, "Be kind.")
    assert suite.prompt_hash(questions, "") != suite.prompt_hash(questions[1:], "")


@pytest.mark.slow
def test_the_stage_scores_every_checkpoint(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    recipe = micro_recipe("evaluation.suite.per_skill=2", "evaluation.suite.threads=1")
    checkpoint = save_tiny(tmp_path / "checkpoint")
    declared = local_context(tmp_path / "names", recipe, "evaluation.suite", {}).input_names
    inputs = dict.fromkeys(declared, checkpoint) | {"heldout": heldout(tmp_path / "heldout", 2)}
    ctx = local_context(tmp_path / "a", recipe, "evaluation.suite", inputs)
    suite.run(ctx)
    report = json.loads((ctx.output("report") / "report.json").read_text())
    names = set(declared) - {"heldout"}
    assert set(report["checkpoints"]) == set(report["digests"]) == names
    assert report["heldout"]["per_skill"] == dict.fromkeys(SKILLS, 2)
    assert set(report["checkpoints"]["mixed_rl"]["modes"]) == {"direct", "thinking"}
    assert set(report["checkpoints"]["multitask"]["modes"]) == {"direct"}
    # Equal checkpoints answer alike, whatever their name.
    skills = [entry["modes"]["direct"]["skills"] for entry in report["checkpoints"].values()]
    assert all(entry == skills[0] for entry in skills)
    assert report["token_budget"] == {"direct": 8, "thinking": 8}
    shown = report["examples"]
    assert {entry["skill"] for entry in shown} == set(SKILLS)
    assert all((ctx.output("report") / entry["image"]).is_file() for entry in shown)
    assert set(shown[0]["replies"]) == names


def test_router_health_is_for_expert_models_only() -> None:
    torch.set_num_threads(1)
    prompts = [Prompt(s.messages[:1], [decode_image(s.images[0])]) for s in pool(2)]
    assert router_health(*tiny_model(), prompts) == {}
    experts = tiny_model(load_recipe("micro-moe"))
    health = router_health(*experts, prompts)
    assert 0.0 < health["router_entropy"] <= 1.0
    assert health["router_load_max_over_mean"] >= 1.0
