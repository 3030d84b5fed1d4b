"""The policy: log-probabilities of sampled replies in packed rows, and the updates.

Shape legend: N response tokens of one row, S responses of one row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from model.modeling import SailVLForConditionalGeneration, freeze_except
from model.processor import Encoded, SailVLProcessor
from sailyard.recipe import RLRecipe
from training.engine import make_learner
from training.packing import collate_rows, on_device, pack_rows
from training.rl.losses import BatchSize, ClipRange, PolicyTokens, dapo_loss, gspo_loss
from training.rl.rewards import Prompt
from training.world import World, join_world

if TYPE_CHECKING:
    from model.generation import Completion

Algorithm = Literal["dapo", "gspo"]


@dataclass(frozen=True, slots=True)
class Response:
    """A reply to learn from: prompt and reply tokens (loss_mask on the reply) and advantage."""

    encoded: Encoded
    advantage: float

    @property
    def num_tokens(self) -> int:
        return int(self.encoded.loss_mask.sum())


@dataclass(slots=True)
class UpdateStats:
    """Sums over the updates of one step."""

    num_ratios: int = 0
    num_clipped: int = 0
    num_tokens: int = 0
    kl_sum: float = 0.0
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)

    @property
    def num_updates(self) -> int:
        return len(self.losses)

    @property
    def finite(self) -> bool:
        """Whether every update changed the weights."""
        return all(math.isfinite(value) for value in (*self.losses, *self.grad_norms))

    def sum_over(self, world: World) -> None:
        """Add up the ranks' counts; losses and norms are those of all ranks already."""
        counts = [self.num_ratios, self.num_clipped, self.num_tokens, self.kl_sum]
        *whole, self.kl_sum = world.sum(counts)
        self.num_ratios, self.num_clipped, self.num_tokens = map(int, whole)

    def metrics(self) -> dict[str, float]:
        """clip_fraction, kl (nats per token, k3 estimate), loss and grad_norm (means)."""
        if not self.num_updates:
            return {}
        return {
            "clip_fraction": self.num_clipped / self.num_ratios,
            "kl": self.kl_sum / self.num_tokens,
            "loss": float(np.mean(self.losses)),
            "grad_norm": float(np.mean(self.grad_norms)),
        }


IDLE = Response(
    Encoded(np.zeros(2, dtype=np.int64), np.array([False, True]), np.zeros((0, 3, 0, 0))), 0.0
)
"""A row of nothing, for a rank that has run out of rows while others have not."""


def encode_response(
    processor: SailVLProcessor, prompt: Prompt, completion: Completion, advantage: float
) -> Response:
    """Append the sampled token ids themselves: text encoded again may split differently."""
    head = processor.encode(
        prompt.messages, prompt.images, is_video=prompt.is_video, add_generation_prompt=True
    )
    reply = np.asarray(completion.token_ids, dtype=np.int64)
    mask = np.zeros(len(head.input_ids) + len(reply), dtype=bool)
    mask[len(head.input_ids) :] = True
    ids = np.concatenate([head.input_ids, reply])
    encoded = replace(head, input_ids=ids, loss_mask=mask)
    return Response(encoded, advantage)


class MiniBatch:
    """This rank's packed rows of one update.

    old_logprobs: per micro-batch, the log-probabilities under the policy that sampled; None
    while that is still the policy itself, so that the forward pass of the update gives them.
    size: of the mini-batch over all ranks.
    """

    def __init__(self, responses: Sequence[Response], recipe: RLRecipe, world: World) -> None:
        lengths = [len(response.encoded.input_ids) for response in responses]
        rows = [[responses[i] for i in row] for row in pack_rows(lengths, recipe.seq_len)]
        size = recipe.micro_batch_size
        self.shards = [rows[i : i + size] for i in range(0, len(rows), size)]
        # ZeRO sums gradients in every backward pass: all ranks need as many.
        self.num_idle = max(world.gather(len(self.shards))) - len(self.shards)
        tokens, sequences = world.sum([sum(r.num_tokens for r in responses), len(responses)])
        self.size = BatchSize(int(tokens), int(sequences))
        self.old_logprobs: list[Tensor] | None = None


class Policy:
    """The model being trained: its optimizer, its algorithm, its precision.

    A mini-batch of responses is packed into rows of at most `seq_len` tokens, never padded to
    the longest. The reference ("old") log-probabilities come from this same forward pass and not
    from the sampler, whose other kernels and precision would pass for a change of the policy.
    Several ranks each bring the groups that they sampled; the loss is divided by the size of the
    mini-batch over all of them, so the update is that of one rank.
    """

    def __init__(self, model: SailVLForConditionalGeneration, recipe: RLRecipe) -> None:
        self.model, self.recipe = model, recipe
        self.algorithm = resolve_algorithm(recipe.algorithm, model)
        self.clip = ClipRange(recipe.clip_low, recipe.clip_high)
        freeze_except(model, recipe.trainable)
        if recipe.activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=recipe.lr,
            betas=recipe.betas,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.world = join_world()
        self.learner = make_learner(model, optimizer, recipe, self.world)

    def improve(
        self,
        groups: Sequence[Sequence[Response]],
        lr: float,
        shuffle: np.random.Generator,
        places: Sequence[tuple[int, int]] | None = None,
    ) -> UpdateStats:
        """One pass of up to `updates_per_step` updates over the groups of a step.

        Whole groups go into one mini-batch, so that its advantages sum to zero. Fewer groups
        than updates give fewer updates. An update whose loss or gradient is no number leaves the
        weights as they are and is the last: the result is not `finite`.

        Args:
            groups: This rank's.
            places: Sort keys of the groups, all different over all ranks, that put them in the
                order in which one rank would have them; as given, for one rank.
        """
        stats = UpdateStats()
        if places is None:
            places = [(0, i) for i in range(len(groups))]
        order = sorted(place for part in self.world.gather(list(places)) for place in part)
        if not order:
            return stats
        mine = {order.index(place): group for place, group in zip(places, groups, strict=True)}
        shuffled = shuffle.permutation(len(order))
        chunks = np.array_split(shuffled, min(self.recipe.updates_per_step, len(order)))
        batches = [
            MiniBatch([r for i in chunk for r in mine.get(int(i), ())], self.recipe, self.world)
            for chunk in chunks
        ]
        for batch in batches[1:]:
            self.remember(batch)
        for batch in batches:
            self._update(batch, lr, stats)
            if not stats.finite:
                break
        stats.sum_over(self.world)
        return stats

    @torch.no_grad()
    def remember(self, batch: MiniBatch) -> None:
        """Note the log-probabilities of the policy as it is, before updates change it."""
        self.model.eval()
        batch.old_logprobs = [self.logprobs(shard) for shard in batch.shards]

    def _update(self, batch: MiniBatch, lr: float, stats: UpdateStats) -> None:
        loss = self.accumulate(batch, stats)
        norm = self.learner.update(lr)
        stats.losses.append(self.world.sum([loss])[0])
        stats.grad_norms.append(norm)

    def accumulate(self, batch: MiniBatch, stats: UpdateStats) -> float:
        """Add the gradient of a mini-batch, shard by shard; this rank's share of its loss."""
        self.model.train()
        loss_of = gspo_loss if self.algorithm == "gspo" else dapo_loss
        total = 0.0
        num_passes = len(batch.shards) + batch.num_idle
        for number, rows in enumerate(batch.shards):
            logprobs_N = self.logprobs(rows, last=number == num_passes - 1)
            old = batch.old_logprobs
            tokens = PolicyTokens(
                logprobs_N=logprobs_N,
                old_logprobs_N=logprobs_N.detach() if old is None else old[number],
                sequence_N=_sequence_ids(rows).to(logprobs_N.device),
                advantages_S=torch.tensor(
                    [r.advantage for row in rows for r in row], device=logprobs_N.device
                ),
            )
            out = loss_of(tokens, batch.size, self.clip)
            loss = out.loss if torch.isfinite(out.loss) else out.loss * math.nan
            self.learner.backward(loss, last=number == num_passes - 1)
            total += float(out.loss.detach())
            stats.num_ratios += out.num_ratios
            stats.num_clipped += out.num_clipped
            stats.kl_sum += out.kl_sum
            stats.num_tokens += len(logprobs_N)
        for number in range(len(batch.shards), num_passes):
            last = number == num_passes - 1
            self.learner.backward(self.logprobs([[IDLE]], last=last).sum() * 0.0, last)
        return total

    def logprobs(self, rows: Sequence[Sequence[Response]], last: bool = True) -> Tensor:
        """Log-probabilities [N] of the reply tokens at the sampling temperature, row by row.

        Args:
            last: Of an update's passes.
        """
        encoded = [[response.encoded for response in row] for row in rows]
        length = max(sum(len(e.input_ids) for e in row) for row in encoded)
        batch = on_device(collate_rows(encoded, length), self.world.device)
        output = self.learner.forward(
            last=last,
            input_ids=batch["input_ids"],
            **batch["images"],
            position_ids=batch["position_ids"],
            attention_mask=batch["segment_ids"],
            labels=batch["labels"],
            temperature=self.recipe.temperature,
            output_router_logits=False,
        )
        # Labelled positions come in row-major order, which is that of the rows.
        log_probs: Tensor = -output.loss_per_token
        return log_probs


def resolve_algorithm(
    wanted: Literal["dapo", "gspo", "auto"], model: SailVLForConditionalGeneration
) -> Algorithm:
    """auto: GSPO where tokens choose experts, DAPO otherwise (paper section 4.2.3)."""
    if wanted != "auto":
        return wanted
    return "gspo" if model.language_model.config.model_type == "qwen3_moe" else "dapo"


def _sequence_ids(rows: Sequence[Sequence[Response]]) -> Tensor:
    lengths = torch.tensor([response.num_tokens for row in rows for response in row])
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)
