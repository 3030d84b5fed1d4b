"""Text, pictures and untrained networks of a recipe's shape, for stages run by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from curation.world.build import reference_samples
from curation.world.text import text_samples
from model.checkpoint import build_from_recipe, save_language, save_model
from model.processor import SailVLProcessor
from model.tokenizer import train_tokenizer
from sailyard.recipe import load_recipe
from sailyard.samples import write_samples


def make_materials(
    folder: Path, recipe: str, num_texts: int = 80, num_pictures: int = 30
) -> dict[str, Path]:
    """Name -> directory: text, pictures, mixed (both), language, model."""
    torch.set_num_threads(1)
    shape = load_recipe(recipe).model
    text = list(text_samples(num_texts, np.random.default_rng(0)))
    write_samples(folder / "text", text)
    pictures = list(
        reference_samples(num_pictures, np.random.default_rng(1), shape.vision.image_size)
    )
    write_samples(folder / "pictures", pictures)
    write_samples(folder / "mixed", [*pictures, *text])
    tokenizer = train_tokenizer((m["content"] for s in text for m in s.messages), 600)
    model = build_from_recipe(shape, tokenizer, seed=3)
    save_language(folder / "language", model.language_model, tokenizer)
    save_model(folder / "model", model, SailVLProcessor.from_recipe(shape, tokenizer))
    return {path.name: path for path in folder.iterdir()}
