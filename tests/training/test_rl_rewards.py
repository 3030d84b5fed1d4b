"""Reward tables: which reply earns what, under every scheme."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from PIL import Image

from curation.policy import as_prompt, is_reasoning, rewrite_options
from curation.world.sources import prompt_pool
from training.rl.api_judge import ApiJudge
from training.rl.judges import RoutingJudge
from training.rl.rewards import (
    ALL_GOOD,
    Prompt,
    RewardError,
    RewardScheme,
    RewardTerms,
    ThinkVerdict,
    score,
)
from training.rl.rollouts import to_prompt

VERIFIABLE = RewardScheme()
MIXED = RewardScheme(0.6, 0.3, 0.1)
CASCADE = RewardScheme(0.6, 0.3, 0.1, cascade=True)
RULES = RoutingJudge()

GOOD = "<think>The left digit is 3. The right digit is 4. 3 + 4 = 7.</think>\n\\boxed{7}"
SLIP = "<think>The left digit is 3. The right digit is 4. 3 + 4 = 8.</think>\n\\boxed{7}"
UNSEEN = "<think>The left digit is 5. The right digit is 2. 5 + 2 = 7.</think>\n\\boxed{7}"
WRONG = "<think>The left digit is 3. The right digit is 5. 3 + 5 = 8.</think>\n\\boxed{8}"


def prompt(think: bool, **changes: Any) -> Prompt:
    fields: dict[str, Any] = {
        "id": "sum-1",
        "messages": [{"role": "user", "content": "Add the two digits."}],
        "images": [],
        "answer": "7",
        "check": "number",
        "think": think,
        "scene": {"kind": "digits", "digits": [3, 4]},
    }
    return Prompt(**{**fields, **changes})


def reward(reply: str, scheme: RewardScheme, think: bool, finished: bool = True) -> float:
    terms = score(prompt(think), reply, finished, scheme, RULES)
    return round(scheme.combine(terms), 6)


@pytest.mark.parametrize(
    ("reply", "verifiable", "mixed"),
    [
        (GOOD, 1.0, 1.0),
        (WRONG, 0.1, 0.1),  # the chain itself is flawed too: a digit that is not there
        (SLIP, 1.0, 0.7),  # right by luck: only the mixed reward looks at the chain
        (UNSEEN, 1.0, 0.7),
        ("7", 0.0, 0.0),  # no \boxed{}: no answer where one was asked for in a box
        ("\\boxed{7}", 0.9, 0.6),  # answer without the thought that was asked for
        ("<think></think>\\boxed{7}", 0.9, 0.6),
        ("<think>3 + 4 = 7 \\boxed{7}", 0.9, 0.6),  # block never closed
        ("<think>3 + 4 = 7.</think>7", 0.0, 0.3),  # sound thought, no box
        ("", 0.0, 0.0),
    ],
)
def test_thinking_prompt(reply: str, verifiable: float, mixed: float) -> None:
    assert reward(reply, VERIFIABLE, think=True) == pytest.approx(verifiable)
    assert reward(reply, MIXED, think=True) == pytest.approx(mixed)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("7", 1.0),
        ("8", 0.4),  # wrong, but direct and well formed
        (GOOD, 0.6),  # right, but it thought where nobody asked
        ("<think></think>7", 0.6 + 0.3),  # an empty block is no thought, yet not the format
        ("  ", 0.3),
    ],
)
def test_direct_prompt(reply: str, expected: float) -> None:
    assert reward(reply, MIXED, think=False) == pytest.approx(expected)


def test_a_reply_cut_off_by_the_budget_is_not_well_formed() -> None:
    assert reward(GOOD, VERIFIABLE, think=True, finished=False) == pytest.approx(0.9)
    assert reward("7", MIXED, think=False, finished=False) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("reply", "think", "expected"),
    [
        (GOOD, True, 1.0),
        (SLIP, True, 0.9 * (1 / 3) + 0.1),  # unsound, and its conclusion is not its answer
        (UNSEEN, True, 0.9 * (2 / 3) + 0.1),  # one of three verdicts fails
        (WRONG, True, 0.1),  # a product: a wrong answer earns the format only
        ("\\boxed{7}", True, 0.0),  # right answer, but mode and format fail
        ("7", False, 1.0),  # thinking rightly skipped counts as 1 (spec A18)
        (GOOD, False, 0.0),
        ("8", False, 0.1),
    ],
)
def test_cascade(reply: str, think: bool, expected: float) -> None:
    assert reward(reply, CASCADE, think) == pytest.approx(expected, abs=1e-6)


def test_cascade_and_sum_by_hand() -> None:
    terms = RewardTerms(answer=1.0, format=0.0, mode=1.0, verdict=ThinkVerdict(True, False, True))
    assert CASCADE.combine(terms) == pytest.approx(0.9 * 2 / 3)
    assert MIXED.combine(terms) == pytest.approx(0.6)  # SAIL-VL2's think term is all or nothing


@pytest.mark.parametrize("weights", [(0.9, 0.3, 0.1), (0.5, 0.2, 0.1), (1.2, -0.3, 0.1)])
def test_weights_must_make_a_reward(weights: tuple[float, float, float]) -> None:
    with pytest.raises(RewardError, match=r"weight"):
        RewardScheme(*weights)


def test_prompts_that_nothing_can_score_are_refused_before_training() -> None:
    known = {"answer": "7", "check": "number", "think": True, "scene": {"kind": "digits"}}
    RULES.check_prompt("a", known, MIXED)
    RULES.check_prompt("a", {**known, "scene": None}, VERIFIABLE)  # the thought is not judged
    for meta, scheme, word in [
        ({"check": "number"}, VERIFIABLE, "'answer' and 'check'"),
        ({**known, "check": "guess"}, VERIFIABLE, "'guess'"),
        ({**known, "check": "open"}, VERIFIABLE, "judge model"),
        ({**known, "scene": None}, MIXED, "judge model"),
    ]:
        with pytest.raises(RewardError, match=word):
            RULES.check_prompt("a", meta, scheme)


def test_the_small_world_can_be_solved() -> None:
    """Its own chains and answers earn everything there is, under every scheme."""
    thinking = 0
    for sample in prompt_pool(60, np.random.default_rng(0), 28):
        asked = as_prompt(rewrite_options(sample) or sample, think=is_reasoning(sample))
        item, answer = to_prompt(asked), asked.meta["answer"]
        target = f"<think>{asked.meta['chain']}</think>\n\\boxed{{{answer}}}"
        thinking += item.think
        for scheme in (VERIFIABLE, MIXED, CASCADE):
            terms = score(item, target if item.think else str(answer), True, scheme, RULES)
            assert scheme.combine(terms) == pytest.approx(1.0), (item.question, terms)
    assert 10 < thinking < 50


class _Endpoint(BaseHTTPRequestHandler):
    """Speaks just enough of the chat completions protocol to be asked."""

    asked: list[dict[str, Any]]
    say: dict[str, str]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append(body)
        key = next(k for k in self.say if k in body["messages"][0]["content"])
        message = {"role": "assistant", "content": self.say[key]}
        reply = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "judge",
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        }
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[tuple[str, type[_Endpoint]]]:
    handler = type("Endpoint", (_Endpoint,), {"asked": [], "say": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", handler
    server.shutdown()
    server.server_close()


def test_judge_model_decides_where_no_scene_is_known(
    endpoint: tuple[str, type[_Endpoint]],
) -> None:
    address, handler = endpoint
    handler.say = {
        "is_logically_sound": '```json\n{"is_logically_sound": true, "why": "fine"}\n```',
        "is_hallucination_free": '{"is_hallucination_free": false, "why": "no boat"}',
        "is_consistent": "I would say yes.",  # no JSON: counts as no
        "is_same": '{"is_same": true}',
    }
    api = ApiJudge(address, "judge", "key")
    judge = RoutingJudge(api)
    photo = prompt(True, scene=None, check="open", images=[Image.new("RGB", (8, 8))])
    terms = score(photo, GOOD, True, MIXED, judge)
    assert terms.verdict == ThinkVerdict(sound=True, grounded=False, consistent=False)
    assert (terms.answer, api.num_malformed, len(handler.asked)) == (1.0, 1, 4)
    with_image = [
        any(part["type"] == "image_url" for part in body["messages"][1]["content"])
        for body in handler.asked
    ]
    assert with_image == [False, True, False, False]  # only facts need the picture


def test_rules_spare_the_judge_model() -> None:
    unreachable = ApiJudge("http://127.0.0.1:9/v1", "judge", "key")
    terms = score(prompt(True), GOOD, True, MIXED, RoutingJudge(unreachable))
    assert terms.verdict == ALL_GOOD
