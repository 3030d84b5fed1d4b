"""The pipeline's stages and edges, declared once.

The Airflow DAG, the local runner, the planner and the board are all drawn from here. Nothing
heavy is imported: a scheduler parses this package in milliseconds, and an entry is only a
dotted name until its own process resolves it.

Bump a stage's ``version`` when its code changes what it produces: the number is part of the
cache key, so old results stop matching.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sailyard.pipeline import data, release, training
from sailyard.pipeline.graph import (
    ALWAYS_READABLE,
    GROUPS,
    Pipeline,
    PipelineError,
    Stage,
    UnknownStage,
)
from sailyard.pipeline.release import EVALUATED

if TYPE_CHECKING:
    from sailyard.recipe import Recipe

__all__ = [
    "ALWAYS_READABLE",
    "EVALUATED",
    "GROUPS",
    "Pipeline",
    "PipelineError",
    "Stage",
    "UnknownStage",
    "build_pipeline",
]

# A full-size training stage fills one node; a stage that only runs a model needs one device.
TRAINING_GPUS = 8
INFERENCE_GPUS = 1


def build_pipeline(recipe: Recipe) -> Pipeline:
    """The graph a recipe asks for: a mixture-of-experts model adds expert calibration."""
    moe = recipe.model.language.moe is not None
    full_size = recipe.model.pretrained_language is not None
    devices = recipe.devices
    train_gpus = _chosen(devices.training, TRAINING_GPUS if full_size else 0)
    infer_gpus = _chosen(devices.inference, INFERENCE_GPUS if full_size else 0)
    return Pipeline(
        [
            *data.source_stages(),
            *training.bootstrap_stages(train_gpus),
            *data.curation_stages(infer_gpus, train_gpus),
            *data.mix_stages(),
            *training.alignment_stages(train_gpus),
            *training.pretraining_stages(train_gpus, moe),
            *training.base_sft_stages(train_gpus),
            *training.soup_stages(infer_gpus, recipe.post_training.soup.method == "greedy"),
            *training.thinking_stages(train_gpus, infer_gpus),
            *release.evaluation_stages(infer_gpus),
            *release.deployment_stages(infer_gpus),
        ]
    )


def _chosen(asked: int | None, otherwise: int) -> int:
    return otherwise if asked is None else asked
