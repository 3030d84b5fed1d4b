"""A judge model behind an OpenAI-compatible API, for data whose ground truth no rule knows.

The three questions follow SAIL-RL's schema (appendix C: `is_logically_sound`,
`is_hallucination_free`, `is_consistent`); the wording is ours. SAIL-VL2 does not name its judge.
A remote judge is not a function of the seed: a stage that uses one resumes from its checkpoint
but is not bound to repeat it bit for bit.
"""

from __future__ import annotations

import base64
import io
import json
import re
from typing import Any

from openai import OpenAI
from PIL import Image

from evaluation.answers import extract_answer, extract_thinking
from training.rl.rewards import Prompt, ThinkVerdict

MAX_RETRIES = 4
MAX_REPLY_TOKENS = 512
TIMEOUT_SECONDS = 120.0

_RULES = (
    "You grade a vision-language model. Judge only what is asked, be strict, and answer with one "
    'JSON object and nothing else: {{"{key}": true or false, "why": "one sentence"}}.'
)
_LOGIC = (
    "Is the reasoning logically sound? Say false if it sets the problem up wrongly, contradicts "
    "itself, or holds an arithmetic or deductive slip. Do not judge whether its claims about the "
    "image are true.\n\nQuestion:\n{question}\n\nReasoning:\n{thinking}"
)
_FACTS = (
    "Is the reasoning free of hallucination? Check each claim against the image first, then the "
    "question, then common knowledge where neither decides. What the question supposes overrides "
    "common knowledge. One contradicted claim means false.\n\n"
    "Question:\n{question}\n\nReasoning:\n{thinking}"
)
_CONSISTENCY = (
    "Does the final answer follow directly from the reasoning? Do not judge whether either is "
    "true.\n\nQuestion:\n{question}\n\nReasoning:\n{thinking}\n\nFinal answer:\n{answer}"
)
_ANSWER = (
    "Does the given answer mean the same as the reference answer to this question?\n\n"
    "Question:\n{question}\n\nReference answer:\n{reference}\n\nGiven answer:\n{answer}"
)


class ApiJudge:
    """Judges think blocks and open answers with a chat model, one short question per call.

    A reply that holds no JSON verdict counts as "no" (and in `num_malformed`): a run of days
    must not end for one odd sentence. Connection errors are retried by the client, then raised.
    """

    def __init__(self, api_base: str, api_model: str, api_key: str) -> None:
        self._client = OpenAI(
            base_url=api_base, api_key=api_key, max_retries=MAX_RETRIES, timeout=TIMEOUT_SECONDS
        )
        self._model = api_model
        self.num_malformed = 0

    def thinking(self, prompt: Prompt, reply: str) -> ThinkVerdict:
        """Three calls; only the question of facts sees the images."""
        parts = {
            "question": prompt.question,
            "thinking": extract_thinking(reply),
            "answer": extract_answer(reply),
        }
        return ThinkVerdict(
            sound=self._ask("is_logically_sound", _LOGIC.format(**parts), []),
            grounded=self._ask("is_hallucination_free", _FACTS.format(**parts), prompt.images),
            consistent=self._ask("is_consistent", _CONSISTENCY.format(**parts), []),
        )

    def answer(self, prompt: Prompt, reply: str) -> bool:
        """Whether an open answer matches the reference in meaning."""
        text = _ANSWER.format(
            question=prompt.question, reference=prompt.answer, answer=extract_answer(reply)
        )
        return self._ask("is_same", text, [])

    def _ask(self, key: str, text: str, images: list[Image.Image]) -> bool:
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images
        ]
        content.append({"type": "text", "text": text})
        messages: list[Any] = [
            {"role": "system", "content": _RULES.format(key=key)},
            {"role": "user", "content": content},
        ]
        response = self._client.chat.completions.create(
            model=self._model, messages=messages, temperature=0.0, max_tokens=MAX_REPLY_TOKENS
        )
        verdict = _parse_verdict(response.choices[0].message.content or "", key)
        if verdict is None:
            self.num_malformed += 1
        return bool(verdict)


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _parse_verdict(text: str, key: str) -> bool | None:
    """The boolean under `key` in the last JSON object of the text; None where there is none."""
    for candidate in reversed(re.findall(r"\{[^{}]*\}", text)):
        try:
            value = json.loads(candidate).get(key)
        except json.JSONDecodeError:
            continue
        if isinstance(value, bool):
            return value
    return None
