"""From a checkpoint directory to a running engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import load_model
from model.device import own_device
from sailyard.yard import Yard
from serving.engine import Engine
from serving.settings import ServingSettings
from serving.versions import Served, Wanted


def load_served(wanted: Wanted, settings: ServingSettings) -> Served:
    """Fetch and load a version on the GPU if there is one, else on the CPU.

    Raises:
        ValueError: the directory is not a checkpoint of ours (the model's own errors), or holds
            numbers that are none.
    """
    directory = wanted.fetch()
    loaded, processor = load_model(directory, getattr(torch, settings.dtype))
    model: Any = loaded.requires_grad_(False)
    _refuse_broken_weights(model, wanted)
    model.to(own_device())
    text = model.config.text_config
    engine = Engine(
        model,
        processor.decode,
        frozenset({processor.end_token_id}),
        never=processor.never_generated(text.vocab_size).tolist(),
        max_batch=settings.max_batch,
        max_queue=settings.max_queue,
    )
    context = int(text.max_position_embeddings)
    return Served(wanted.name, wanted.digest, engine, processor, context, time.time())


def _refuse_broken_weights(model: torch.nn.Module, wanted: Wanted) -> None:
    """A run that diverged leaves weights that load well and answer nonsense."""
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise ValueError(
                f"{wanted.name}: {name} holds values that are no finite numbers; the run that made "
                "this checkpoint diverged. Serve another version"
            )


def promoted(alias: str, yard: Yard | None = None) -> Callable[[], Wanted | None]:
    """Looks up the version behind a registry alias; its weights come from the artifact store."""
    yard = yard or Yard()

    def look_up() -> Wanted | None:
        version = yard.registry.current(alias)
        if version is None:
            return None
        digest = version.checkpoint
        return Wanted(version.ref, digest, lambda: yard.artifacts.fetch(digest))

    return look_up


def pinned(digest: str, yard: Yard | None = None) -> Callable[[], Wanted]:
    """Looks up one registered checkpoint, by its digest."""
    yard = yard or Yard()

    def look_up() -> Wanted:
        version = yard.registry.version(digest)
        return Wanted(
            version.ref, version.checkpoint, lambda: yard.artifacts.fetch(version.checkpoint)
        )

    return look_up


def local_checkpoint(directory: Path) -> Wanted:
    """A directory served as it is, without a registry, under its own name."""
    name = directory.resolve().name
    return Wanted(name, f"local-{name}", lambda: directory)
