"""The recipe: everything that decides what a run builds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from pydantic import Field, model_validator

from sailyard.recipe.base import Section
from sailyard.recipe.data import Curation, DataRecipe, WorldRecipe
from sailyard.recipe.network import ModelShape
from sailyard.recipe.stages import (
    Alignment,
    Bootstrap,
    Deployment,
    Evaluation,
    PostTraining,
    Pretraining,
)
from sailyard.recipe.training import RLRecipe, TrainRecipe


class Devices(Section):
    """Accelerators that stages take on a cluster. No part of any cache key: results do not change.

    None leaves the choice to the recipe's size: 8 and 1 where the parts are downloaded, else 0.
    """

    training: int | None = Field(None, ge=0, le=32_768)
    """Devices of a training stage, one rank each; more than a node has are several nodes (our
    choice: one node of 8)."""

    inference: int | None = Field(None, ge=0, le=64)
    """Devices of a stage that runs a model in one process (our choice: 1)."""


class Recipe(Section):
    """A whole run. Without any file it is the paper's 2B model."""

    name: str = Field("2b", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Short name, shown in lists; a preset's is its file name."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Root of all randomness; every stage derives its own seed from it."""

    model: ModelShape = ModelShape()
    """Shape of the network."""

    world: WorldRecipe = WorldRecipe()
    """Sizes of the small world."""

    data: DataRecipe = DataRecipe()
    """The user's own data."""

    curation: Curation = Curation()
    """Data stages."""

    bootstrap: Bootstrap = Bootstrap()
    """Small pretrained towers, made here."""

    alignment: Alignment = Alignment()
    """ViT alignment."""

    pretraining: Pretraining = Pretraining()
    """Pretraining."""

    post_training: PostTraining = PostTraining()
    """Post-training."""

    evaluation: Evaluation = Evaluation()
    """Evaluation."""

    deployment: Deployment = Deployment()
    """Deployment."""

    devices: Devices = Devices()
    """Devices on a cluster."""

    @property
    def is_moe(self) -> bool:
        """Whether the language model has experts."""
        return self.model.language.moe is not None

    def packed_stages(self) -> Iterator[tuple[str, TrainRecipe | RLRecipe]]:
        """Dotted path and recipe of every stage that trains on images or text rows."""
        yield "curation.judges", self.curation.judges
        for group in ("bootstrap", "alignment", "pretraining", "post_training"):
            section: Section = getattr(self, group)
            for name in type(section).model_fields:
                stage = getattr(section, name)
                if isinstance(stage, TrainRecipe | RLRecipe):
                    yield f"{group}.{name}", stage

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        longest = self.model.language.max_position_embeddings
        image = self.model.max_image_tokens
        for path, stage in self.packed_stages():
            if stage.seq_len > longest:
                raise ValueError(
                    f"{path}.seq_len {stage.seq_len} exceeds model.language."
                    f"max_position_embeddings {longest}"
                )
            if path != "bootstrap.language" and image >= stage.seq_len:
                raise ValueError(
                    f"{path}.seq_len {stage.seq_len} cannot hold one image of {image} tokens; "
                    "raise it or lower model.max_tiles or model.max_patches"
                )
        return self
