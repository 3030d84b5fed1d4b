"""Inference with the trained caption judges.

A judges artifact is one checkpoint with a ``judges.json`` beside it that says how to ask: for
each dimension ("ita", "vir") a Score prompt answered by 1-5 and a Yes-or-No prompt. Asking is one
forward pass that reads the probability of each allowed answer; nothing is generated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from evaluation.choices import Question, choice_probabilities
from model.checkpoint import load_model
from model.device import own_device

if TYPE_CHECKING:
    from model.modeling import SailVLForConditionalGeneration
    from model.processor import SailVLProcessor

JUDGES_FILE = "judges.json"
DIMENSIONS = ("ita", "vir")


class JudgesError(ValueError):
    """The directory holds no usable judges."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the judges think of one caption."""

    ita: int  # 1-5
    vir: int
    ita_yes: bool
    vir_yes: bool

    def reasons(self, min_score: int, drop_on_no: bool = True) -> list[str]:
        """Why the caption should be dropped; empty when it should stay (spec A9).

        A score below `min_score` in either dimension is a reason, and so is a "No" if
        `drop_on_no`.
        """
        found = []
        for name, score, yes in (("ita", self.ita, self.ita_yes), ("vir", self.vir, self.vir_yes)):
            if score < min_score:
                found.append(f"{name}_score")
            if drop_on_no and not yes:
                found.append(f"{name}_no")
        return found


class Judges:
    """The four judges of one artifact."""

    def __init__(
        self,
        model: SailVLForConditionalGeneration,
        processor: SailVLProcessor,
        prompts: dict[str, dict[str, Any]],
    ) -> None:
        self.model, self.processor, self.prompts = model, processor, prompts

    @classmethod
    def load(cls, directory: Path) -> Judges:
        """Read a judges artifact.

        Raises:
            JudgesError: judges.json is missing or lacks one of the four judges.
        """
        path = Path(directory) / JUDGES_FILE
        if not path.is_file():
            raise JudgesError(f"{directory} holds no {JUDGES_FILE}; is it a judges artifact?")
        prompts = json.loads(path.read_text(encoding="utf-8"))["judges"]
        wanted = [f"{d}_{kind}" for d in DIMENSIONS for kind in ("score", "yorn")]
        missing = [name for name in wanted if name not in prompts]
        if missing:
            raise JudgesError(f"{path} lacks the judge {missing[0]!r}")
        model, processor = load_model(directory)
        model.to(own_device())
        return cls(model, processor, prompts)

    def verdicts(
        self,
        images: Sequence[Sequence[Image.Image]],
        captions: Sequence[str],
        *,
        batch_size: int = 64,
        on_batch: Callable[[int], None] = lambda done: None,
    ) -> list[Verdict]:
        """Judge captions of their images; the highest probability decides.

        `on_batch` is called with the number of captions that all four judges have seen.
        """
        names = list(self.prompts)
        questions = [
            [self._question(name, caption, len(pictures)) for name in names]
            for caption, pictures in zip(captions, images, strict=True)
        ]
        tables = choice_probabilities(
            self.model,
            self.processor,
            images,
            questions,
            batch_size=batch_size,
            on_batch=on_batch,
        )
        best = {
            name: [self.prompts[name]["answers"][int(i)] for i in np.argmax(table, axis=1)]
            for name, table in zip(names, tables, strict=True)
        }
        return [
            Verdict(ita=int(ita), vir=int(vir), ita_yes=ita_yes == "yes", vir_yes=vir_yes == "yes")
            for ita, vir, ita_yes, vir_yes in zip(
                best["ita_score"],
                best["vir_score"],
                best["ita_yorn"],
                best["vir_yorn"],
                strict=True,
            )
        ]

    def _question(self, name: str, caption: str, num_images: int) -> Question:
        judge = self.prompts[name]
        messages = judge_messages(judge["prompt"], caption, num_images)
        return Question(messages, tuple(judge["answers"]))


def judge_messages(prompt: str, caption: str, num_images: int) -> list[dict[str, str]]:
    """The user turn that asks one judge; ``{caption}`` in the prompt is replaced."""
    text = "<image>\n" * num_images + prompt.replace("{caption}", caption)
    return [{"role": "user", "content": text}]
