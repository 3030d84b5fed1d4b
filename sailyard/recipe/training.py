"""How a stage trains: supervised on packed rows, or by reinforcement."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sailyard.recipe.base import Part, Section

Dtype = Literal["float32", "bfloat16"]
ALL_PARTS: list[Part] = ["vision", "adapter", "language"]


class Optimization(Section):
    """What supervised and reinforcement stages share."""

    trainable: list[Part] = Field(ALL_PARTS)
    """Parts that learn; the others stay bit-identical. Paper Tables 3 and 4, by stage."""

    lr: float = Field(1e-5, gt=0, le=1)
    """Peak learning rate of AdamW. Paper Tables 3 and 4 where the stage says so."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment. The paper is silent; our choice."""

    weight_decay: float = Field(0.05, ge=0, le=1)
    """AdamW's decoupled weight decay. The paper is silent; our choice."""

    clip_norm: float = Field(1.0, gt=0)
    """Largest norm of the whole gradient. The paper is silent; our choice."""

    micro_batch_size: int = Field(1, ge=1)
    """Rows in one forward and backward pass; changes memory and speed, not the result."""

    dtype: Dtype = "bfloat16"
    """Precision of forward and backward; weights and optimizer stay in float32. Our choice."""

    threads: int = Field(8, ge=1, le=256)
    """CPU threads of one training process. Our choice."""

    activation_checkpointing: bool = True
    """Keep only layer inputs and compute the rest again in the backward pass: about a third more
    time, several times less memory. The paper is silent; our choice: on, as 2B and 8B at 8,192
    tokens need it on 80 GB (sailyard plan)."""

    parallel: Literal["ddp", "zero1", "zero2", "zero3"] = "zero2"
    """What several ranks share: nothing (ddp), optimizer state (zero1), gradients too (zero2),
    weights too (zero3). One rank without offload is plain torch whatever this says. Changes memory
    and speed, not the result. Paper section 3.5 names ZeRO-2 for the mixture of experts."""

    offload: bool = False
    """Keep optimizer state in the host's memory. Paper section 3.5, for the mixture of experts."""

    max_bad_steps: int = Field(3, ge=1)
    """Steps in a row whose loss or gradient is no number, or a spike, before the run goes back to
    its last checkpoint; when that happens again right after, it stops and names the samples. Our
    choice."""

    step_timeout_s: float = Field(3600, gt=0)
    """A step that takes longer prints where every thread of every rank stands and ends the stage,
    seconds. Our choice."""

    @model_validator(mode="after")
    def _check_optimization(self) -> Self:
        if not self.trainable:
            raise ValueError(
                f"trainable is empty: name at least one part of {', '.join(ALL_PARTS)}"
            )
        if len(set(self.trainable)) != len(self.trainable):
            raise ValueError(f"trainable names a part twice: {self.trainable}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1)")
        if self.offload and self.parallel == "ddp":
            raise ValueError(
                "offload needs parallel zero1, zero2 or zero3: ddp keeps all on the GPU"
            )
        return self


class TrainRecipe(Optimization):
    """One supervised stage."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw for all; muon for the hidden matrices of adapter and language model with adamw for the
    rest, at the same learning rate. The paper is silent; our choice."""

    expert_parallel: int = Field(1, ge=1)
    """Neighbouring ranks that hold each expert once between them, tokens travelling to and fro; 1
    for a copy on every rank. With parallel ddp; must divide ranks and experts; one rank holds all
    whatever this says. Changes memory and speed, not the result. The paper names none."""

    part_lr: dict[Part, float] = Field({})
    """Peak learning rate of single parts instead of lr. The paper is silent; our choice: none."""

    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """Shape after warm-up; wsd stays flat and falls over the last fifth. Paper section 4.2
    (cosine, for LongCoT and Think-Fusion SFT); silent before."""

    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    """Share of the steps in which the rate climbs to its peak. Paper silent; our choice."""

    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Rate at the end as a share of the peak. The paper is silent; our choice."""

    seq_len: int = Field(8192, ge=32)
    """Length of one packed row, tokens. Paper Tables 3 and 4."""

    batch_size: int = Field(512, ge=1)
    """Packed rows in one optimizer step over all ranks. Paper Tables 3 and 4, whose "batch
    size" we read as packed rows."""

    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps; null trains for `epochs`."""

    epochs: float = Field(1.0, gt=0)
    """Passes over the data when max_steps is null. Paper Table 4 (1 where it says so)."""

    checkpoint_every: int = Field(500, ge=1)
    """Optimizer steps between checkpoints. Our choice."""

    weights: dict[str, float] = Field({})
    """Relative weight of each dataset input in the stream; inputs not named weigh as many as they
    hold samples. Our choice."""

    first_tasks: list[str] = Field([])
    """Samples of these tasks are seen before all others, once: a curriculum for small networks
    that learn to look at a place sooner when nothing else is asked. Our choice: none."""

    loss_norm: Literal["token", "square", "turn", "sample"] = "token"
    """Mean over labelled tokens (token); mean over answers of their token means, so that a one-word
    answer weighs as much as a caption (turn); half way between, a token weighing 1 / sqrt(length of
    its answer) (square, as InternVL 2.5 does, arXiv:2412.05271); or mean over samples of their
    token sums, as the equations of paper section 4.2 are written (sample). Our choice: token."""

    look_ahead: int = Field(256, ge=1)
    """Samples the packer holds to choose from, over all ranks. The paper names a buffer, not its
    size; our choice."""

    visual_balance: bool = False
    """Choose rows that cost the same in vision and in language, and deal them evenly to ranks
    (paper section 5). Worth it with any_resolution and several ranks; give look_ahead 32 samples
    per row of a step. Our choice: off."""

    too_long: Literal["quarantine", "truncate"] = "quarantine"
    """What happens to a sample longer than seq_len: left out (quarantine), or cut at its end unless
    the cut would go through an image or leave nothing to learn (truncate). Either is counted and
    named in the stage's summary. The paper only says that packing truncates less; our choice."""

    spike_factor: float | None = Field(None, gt=1)
    """A loss this many times the median of the last 64 steps counts as a bad step. Our choice:
    null, only what is no number does."""

    @model_validator(mode="after")
    def _check_train(self) -> Self:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} does not divide batch_size "
                f"{self.batch_size}"
            )
        if self.expert_parallel > 1 and self.parallel != "ddp":
            raise ValueError(
                f"expert_parallel {self.expert_parallel} goes with parallel ddp: {self.parallel} "
                "shares the experts' state already, in slices over all ranks"
            )
        frozen = [part for part in self.part_lr if part not in self.trainable]
        if frozen:
            raise ValueError(f"part_lr names {frozen}, which trainable {self.trainable} does not")
        for name, rate in self.part_lr.items():
            if not 0 < rate <= 1:
                raise ValueError(f"part_lr.{name} is {rate}, it must lie in (0, 1]")
        if any(weight < 0 for weight in self.weights.values()):
            raise ValueError(f"weights {self.weights} must not be negative")
        if self.weights and not any(self.weights.values()):
            raise ValueError("weights are all zero: nothing would be drawn")
        return self


class TowerRecipe(Section):
    """A ViT from nothing, by naming what images show."""

    steps: int = Field(20_000, ge=1)
    """Optimizer steps. Our choice."""

    batch_size: int = Field(1024, ge=1)
    """Images per step. Our choice."""

    lr: float = Field(1e-3, gt=0, le=1)
    """Peak learning rate, cosine to a twentieth. Our choice."""

    weight_decay: float = Field(0.05, ge=0, le=1)
    """AdamW's decoupled weight decay. Our choice."""

    clip_norm: float = Field(1.0, gt=0)
    """Largest norm of the whole gradient. Our choice."""

    checkpoint_every: int = Field(500, ge=1)
    """Steps between checkpoints. Our choice."""


class AdaLRS(Section):
    """Search for the learning rate while training runs (paper section 3.2.3)."""

    enabled: bool = True
    """Search at all. Paper section 3.2.1: on for basic pretraining."""

    a: int = Field(3, gt=1)
    """Factor by which a trial raises the rate. AdaLRS section 4; 2e-4 x 3^3 / 2^3 is the
    paper's 6.75e-4."""

    b: int = Field(2, gt=1)
    """Divisor by which a failed trial lowers the rate. AdaLRS section 4."""

    decay: float = Field(0.99, gt=0, lt=1)
    """Per-trial shrinking of both factors (lambda). AdaLRS section 4."""

    window: int = Field(100, ge=3)
    """Steps over which the descent speed is fitted. Not found in any source; our choice."""

    epsilon: float = Field(1.0, ge=0)
    """Half the margin by which speeds must differ, in standard errors of their difference, so that
    it follows the noise of the loss. AdaLRS gives no number; our choice."""

    start: float = Field(0.10, ge=0, lt=1)
    """Share of training after which the search begins. AdaLRS section 4."""

    end: float = Field(0.40, gt=0, le=1)
    """Share of training after which it ends. AdaLRS section 4."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.start >= self.end:
            raise ValueError(f"start {self.start} must come before end {self.end}")
        return self


class BasicTrainRecipe(TrainRecipe):
    """Basic pretraining: a supervised stage with AdaLRS."""

    adalrs: AdaLRS = AdaLRS()
    """The search for the learning rate."""


class RLRecipe(Optimization):
    """One reinforcement stage (paper section 4.2.3 and, for 4.2.5, the same numbers)."""

    algorithm: Literal["dapo", "gspo", "auto"] = "auto"
    """auto is DAPO for a dense model and GSPO for experts. Paper section 4.2.3."""

    lr: float = Field(1e-6, gt=0, le=1)
    """Learning rate, constant. Paper section 4.2.3."""

    weight_decay: float = Field(0.0, ge=0, le=1)
    """AdamW's decoupled weight decay. The paper is silent; our choice."""

    steps: int = Field(171, ge=1)
    """Rounds of rollouts and updates. Paper silent; our choice: one pass over the prompts."""

    prompts_per_step: int = Field(410, ge=1)
    """Prompts in one round. Paper section 4.2.3: 2048 rollouts, in groups of 5."""

    rollouts_per_prompt: int = Field(5, ge=2)
    """Answers sampled per prompt, the group whose rewards are compared. SAIL-RL appendix A."""

    temperature: float = Field(1.0, gt=0, le=2)
    """Sampling temperature of rollouts. The paper is silent; our choice."""

    max_new_tokens: int = Field(4096, ge=1)
    """Longest rollout, tokens. Paper section 4.2.3."""

    seq_len: int = Field(20_480, ge=32)
    """Longest prompt and rollout together, tokens: 16384 + 4096. Paper section 4.2.3."""

    updates_per_step: int = Field(8, ge=1)
    """Gradient updates per round. Paper section 4.2.3."""

    clip_low: float = Field(0.20, gt=0, lt=1)
    """Probability ratios are clipped below 1 - clip_low. Paper section 4.2.3; for GSPO, whose
    ratio is per sequence, set about 3e-4."""

    clip_high: float = Field(0.28, gt=0)
    """Probability ratios are clipped above 1 + clip_high. Paper section 4.2.3 gives [0.20,
    0.28], read as DAPO's asymmetric bounds; for GSPO about 4e-4."""

    answer_weight: float = Field(0.9, ge=0, le=1)
    """Share of the answer's correctness in the reward. Paper silent; SAIL-RL's 0.9."""

    think_weight: float = Field(0.0, ge=0, le=1)
    """Share of the thought's quality in the reward. Paper section 4.2.5: mixed RL only."""

    format_weight: float = Field(0.1, ge=0, le=1)
    """Share of the output's format in the reward. Paper silent; SAIL-RL's 0.1."""

    cascade: bool = False
    """Multiply answer and thought instead of adding them: (1 - format_weight) x answer x think
    + format_weight x format. SAIL-RL section 3.3."""

    overlong_buffer: int = Field(0, ge=0)
    """Last tokens of max_new_tokens over which a penalty on length grows from 0 to 1; 0 for none.
    DAPO section 3.4; the paper is silent; our choice: none."""

    judge_api_base: str = ""
    """OpenAI-compatible API of the model that judges thoughts and open answers which no rule can;
    its key is the environment variable OPENAI_API_KEY. Empty: prompts that need one are refused."""

    judge_api_model: str = ""
    """Name of the judging model there. The paper does not name its judge."""

    dynamic_sampling: bool = True
    """Leave out groups whose rewards are all equal and sample others. DAPO; paper silent."""

    checkpoint_every: int = Field(10, ge=1)
    """Rounds between checkpoints. Our choice."""

    @model_validator(mode="after")
    def _check_rl(self) -> Self:
        if self.parallel == "zero3":
            raise ValueError(
                "parallel is zero3, under which no rank holds the weights that rollouts are "
                "sampled with: set zero2, zero1 or ddp"
            )
        if self.clip_low > self.clip_high:
            raise ValueError(
                f"clip_low {self.clip_low} exceeds clip_high {self.clip_high}; the paper's are "
                "0.20 and 0.28"
            )
        if self.overlong_buffer > self.max_new_tokens:
            raise ValueError(
                f"overlong_buffer {self.overlong_buffer} exceeds max_new_tokens "
                f"{self.max_new_tokens}"
            )
        if bool(self.judge_api_base) != bool(self.judge_api_model):
            raise ValueError("judge_api_base and judge_api_model go together: set both or neither")
        total = self.answer_weight + self.think_weight + self.format_weight
        if abs(total - 1.0) > 1e-6:
            raise ValueError(
                f"answer_weight + think_weight + format_weight is {total:g}, it must be 1"
            )
        if self.max_new_tokens >= self.seq_len:
            raise ValueError(
                f"max_new_tokens {self.max_new_tokens} leaves no room for a prompt in seq_len "
                f"{self.seq_len}"
            )
        return self


class CalibrationRecipe(Section):
    """Expert calibration on text: the router learns to use its experts evenly (MoE only)."""

    steps: int = Field(200, ge=1)
    """Optimizer steps. Paper section 2.2 gives the idea only; our choice."""

    lr: float = Field(1e-3, gt=0, le=1)
    """Learning rate of the routers; nothing else learns. Our choice."""

    batch_size: int = Field(16, ge=1)
    """Text rows per step. Our choice."""

    seq_len: int = Field(4096, ge=32)
    """Length of one text row, tokens. Our choice."""

    dtype: Dtype = "bfloat16"
    """Precision of forward and backward. Our choice."""

    threads: int = Field(8, ge=1, le=256)
    """CPU threads of the process. Our choice."""
