"""A run of a recipe whose every model lives on `tests.pretend.DEVICE`.

`python -m tests.pretend_run RECIPE LAST_STAGE A.B=VALUE...` in SAILYARD_HOME. In this one process,
as the device exists in no other. Then the newest checkpoint is served and asked. Says on its last
line where the matrices of each stage were multiplied, as JSON: {stage: [device types]}.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

import model.device
from tests.pretend import DEVICE

# Before anything else imports the function that is replaced here.
model.device.own_device = lambda local=0: DEVICE

from model.processor import SailVLProcessor  # noqa: E402
from sailyard.runs import create_run, load_run, stage_result  # noqa: E402
from sailyard.stage.runner import execute  # noqa: E402
from sailyard.yard import Yard  # noqa: E402
from serving.engine import Piece  # noqa: E402
from serving.load import load_served, local_checkpoint  # noqa: E402
from serving.reply import Sampling  # noqa: E402
from serving.settings import ServingSettings  # noqa: E402


def main(arguments: Sequence[str]) -> None:
    recipe, last, *changes = arguments
    save_from_the_cpu()
    yard = Yard()
    run_id = create_run(recipe, changes, yard=yard)
    run = load_run(run_id, yard)
    seen: dict[str, set[str]] = {}
    checkpoint = ""
    for stage in run.pipeline.stages:
        watch(seen.setdefault(stage.name, set()))
        if execute(yard, run, stage):
            sys.exit(f"{stage.name} failed")
        result = stage_result(run_id, stage.name, yard)
        assert result is not None
        checkpoint = result.outputs.get("checkpoint", checkpoint)
        if stage.name == last:
            break
    watch(seen.setdefault("serving", set()))
    ask(yard.artifacts.fetch(checkpoint))
    print(json.dumps({name: sorted(kinds) for name, kinds in seen.items() if kinds}))


def save_from_the_cpu() -> None:
    """transformers asks tensors for their storage, which those of the device do not have."""
    save = PreTrainedModel.save_pretrained

    def saved(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        device = self.device
        save(self.to("cpu"), *args, **kwargs)
        self.to(device)

    PreTrainedModel.save_pretrained = saved  # type: ignore[assignment]


def watch(kinds: set[str]) -> None:
    """Note in `kinds` where matrices are multiplied from now on."""

    def note(module: torch.nn.Module, *_: Any) -> None:
        if isinstance(module, torch.nn.Linear):
            kinds.add(module.weight.device.type)

    if hooks:
        hooks.pop().remove()
    hooks.append(torch.nn.modules.module.register_module_forward_pre_hook(note))


hooks: list[torch.utils.hooks.RemovableHandle] = []


def ask(checkpoint: Any) -> None:
    """One question to a served checkpoint."""
    served = load_served(local_checkpoint(checkpoint), ServingSettings())
    processor: SailVLProcessor = served.processor
    encoded = processor.encode([{"role": "user", "content": "red"}], add_generation_prompt=True)
    pieces: list[Piece] = []
    ended = threading.Event()

    def emit(piece: Piece) -> None:
        pieces.append(piece)
        if piece.last:
            ended.set()

    served.engine.submit(encoded, Sampling(max_tokens=4), emit)
    assert ended.wait(300)
    served.engine.close(60)
    assert pieces[-1].error is None, pieces[-1]


if __name__ == "__main__":
    main(sys.argv[1:])
