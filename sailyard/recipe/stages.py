"""The training, evaluation and deployment stages with the paper's numbers."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sailyard.recipe.base import Section
from sailyard.recipe.training import (
    AdaLRS,
    BasicTrainRecipe,
    CalibrationRecipe,
    RLRecipe,
    TowerRecipe,
    TrainRecipe,
)


class Bootstrap(Section):
    """Small towers from nothing, when no pretrained ones are named. All numbers our choice."""

    language: TrainRecipe = TrainRecipe(
        trainable=["language"], lr=3e-4, batch_size=64, seq_len=2048
    )
    """A language model on text alone."""

    tower: TowerRecipe = TowerRecipe()
    """The ViT alone, on the tags of the reference set; skipped for a pretrained tower."""

    adapter: TrainRecipe = TrainRecipe(trainable=["adapter"], lr=3e-4, batch_size=64, epochs=0.1)
    """The adapter alone, between that ViT and the frozen language model."""

    vision: TrainRecipe = TrainRecipe(lr=3e-4, batch_size=64)
    """The ViT inside a captioner, on the captions and questions of the reference set."""


class AlignmentMetrics(Section):
    """Distance between visual and text features (paper section 6.2)."""

    num_images: int = Field(64, ge=2)
    """Held-out images whose visual tokens are compared. The paper shows 5; our choice."""

    num_text_rows: int = Field(4096, ge=2)
    """Rows of the text embedding table drawn for comparison. Paper silent; our choice."""

    projections: int = Field(128, ge=1)
    """Random directions of the sliced Wasserstein distance. Paper silent; our choice."""


class Alignment(Section):
    """SAIL-ViT's three stages (paper section 2.1.1)."""

    warmup: TrainRecipe = TrainRecipe(trainable=["adapter"], lr=2e-4, batch_size=1920)
    """Stage I: adapter alone, lr 2e-4, batch 1920, rows of 8192 (paper section 2.1.1)."""

    fine_grained: TrainRecipe = TrainRecipe(
        trainable=["vision", "adapter"], lr=2e-5, batch_size=512
    )
    """Stage II: ViT and adapter, lr 2e-5, batch 512 (paper section 2.1.1)."""

    world_knowledge: TrainRecipe = TrainRecipe(lr=1e-5, batch_size=512)
    """Stage III: everything, lr 1e-5, batch 512 (paper section 2.1.1)."""

    metrics: AlignmentMetrics = AlignmentMetrics()
    """What is measured after each."""


class Pretraining(Section):
    """Pretraining (paper section 3.2)."""

    expert_calibration: CalibrationRecipe = CalibrationRecipe()
    """Routers on text, before anything else; MoE only (paper section 2.2)."""

    basic: BasicTrainRecipe = BasicTrainRecipe(
        trainable=["adapter"], lr=2e-4, batch_size=2048, adalrs=AdaLRS()
    )
    """Basic: a fresh adapter, lr 2e-4 raised by AdaLRS, batch 2048 (paper Table 3)."""

    multitask: TrainRecipe = TrainRecipe(lr=2e-5, batch_size=2048)
    """Multi-task: everything (paper Table 3); lr and batch not found, our choice."""


class Soup(Section):
    """Average of homogeneous checkpoints (paper section 4.2.1)."""

    method: Literal["average", "greedy"] = "average"
    """average takes every ingredient; greedy takes them in the order of their loss on held-out
    samples, each only if the average's loss does not rise (arXiv:2203.05482). Paper section 4.2.1
    implies the plain mean."""

    validation_per_skill: int = Field(50, ge=1)
    """Held-out samples of each skill that a greedy soup goes by, the last of the set, where the
    evaluation suite takes the first. Our choice."""

    threads: int = Field(8, ge=1, le=256)
    """CPU threads of a greedy soup's measurements. Our choice."""

    weights: dict[str, float] = Field({})
    """Relative weight of each ingredient (the stage's inputs, a and b); none for the plain mean.
    Summed in float32. Paper section 4.2.1 implies the plain mean."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.weights and min(self.weights.values()) <= 0:
            raise ValueError(f"weights {self.weights} must be positive: leave an ingredient out")
        return self


class PostTraining(Section):
    """Post-training (paper section 4.2)."""

    base_sft_1: TrainRecipe = TrainRecipe(lr=1e-5, batch_size=512, max_steps=10_014)
    """World knowledge: everything, 42B tokens (paper Table 3); lr and batch our choice."""

    base_sft_2: TrainRecipe = TrainRecipe(lr=1e-5, batch_size=512, max_steps=9_537)
    """Instructions: everything, 40B tokens (paper Table 3); lr and batch our choice."""

    base_sft_3: TrainRecipe = TrainRecipe(lr=1e-5, batch_size=512, max_steps=3_815)
    """Hard subset: everything, 16B tokens (paper Table 3); lr and batch our choice."""

    base_sft_4: TrainRecipe = TrainRecipe(lr=1e-5, batch_size=256, seq_len=16_384, max_steps=16_689)
    """Video and image 1:1, rows of 16384, 70B tokens (paper Table 3); lr and batch our choice.
    Its sibling for the soup trains with the same numbers in another order."""

    soup: Soup = Soup()
    """The average of base_sft_4 and its sibling."""

    longcot_sft: TrainRecipe = TrainRecipe(lr=1e-6, batch_size=1024, seq_len=20_480)
    """LongCoT: lr 1e-6, cosine, batch 1024, rows of 20480, one epoch (paper Table 4)."""

    verifiable_rl: RLRecipe = RLRecipe()
    """Verifiable rewards: lr 1e-6, 2048 rollouts (paper section 4.2.3)."""

    think_fusion_sft: TrainRecipe = TrainRecipe(lr=1e-6, batch_size=1024, seq_len=20_480)
    """Think-Fusion: lr 1e-6, cosine, batch 1024, rows of 20480, one epoch (paper Table 4)."""

    mixed_rl: RLRecipe = RLRecipe(steps=244, answer_weight=0.6, think_weight=0.3, format_weight=0.1)
    """Mixed rewards: as verifiable RL (paper section 4.2.5); the weights are our choice."""


class Suite(Section):
    """Held-out evaluation of every post-training checkpoint."""

    per_skill: int = Field(100, ge=1)
    """Questions per skill, at most. Our choice."""

    max_new_tokens: int = Field(4096, ge=1)
    """Longest answer, tokens. The authors' VLMEvalKit entry for thinking models."""

    batch_size: int = Field(64, ge=1)
    """Questions answered at once. Our choice."""

    threads: int = Field(8, ge=1, le=256)
    """CPU threads of the process. Our choice."""


class Evaluation(Section):
    """Evaluation."""

    suite: Suite = Suite()
    """The suite on held-out data."""


class GateRule(Section):
    """One condition of promotion."""

    metric: str = Field(min_length=1)
    """Dotted name in the evaluation report of the candidate, such as "overall.accuracy"."""

    op: Literal[">=", ">", "<=", "<"] = ">="
    """How the metric is compared with the value."""

    value: float
    """What it is compared with, in the metric's own unit."""


class Deployment(Section):
    """From a checkpoint to an endpoint. All numbers our choice."""

    alias: str = Field("production", pattern=r"^[a-z][a-z0-9_-]*$")
    """Name that the served version goes by."""

    gate: list[GateRule] = Field([])
    """Conditions that must all hold before promotion; none lets everything pass."""

    approval: Literal["auto", "manual"] = "manual"
    """auto promotes what passes the gate; manual waits for a person."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        seen = [(rule.metric, rule.op) for rule in self.gate]
        repeated = next((rule for rule in seen if seen.count(rule) > 1), None)
        if repeated:
            raise ValueError(f"gate has two rules for {repeated[0]} {repeated[1]}; keep one")
        return self
