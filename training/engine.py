"""One optimizer step over packed rows, the same whatever the micro-batch and number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from model.modeling import SailVLForConditionalGeneration, freeze_except
from model.moe import RouterMeter
from model.processor import Encoded
from sailyard.recipe import Optimization, TrainRecipe
from training.expert_parallel import ExpertParallelLearner, Spread, spread_experts
from training.learner import Learner
from training.muon import Muon
from training.packing import collate_rows, on_device, shares_of_turns
from training.world import World, join_world

# A token weighs (1 / length of its answer) to this power.
POWERS = {"token": 0.0, "sample": 0.0, "square": 0.5, "turn": 1.0}


@dataclass(slots=True)
class StepResult:
    """What one optimizer step measured, over all ranks.

    A loss or gradient norm that is not finite means that the weights were left alone.
    """

    loss: float  # mean cross-entropy per labelled token, nats
    aux_loss: float  # MoE balance loss, 0 for dense models
    source_loss: dict[int, float]  # mean loss per stream source
    grad_norm: float  # before clipping
    part_norms: dict[str, float]  # of each part's gradient; empty where ranks hold slices of it
    num_labels: int
    router: dict[str, float]  # health of the experts on this rank's rows, empty for dense models

    @property
    def finite(self) -> bool:
        """Whether the weights were updated."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Engine:
    """Owns which parts learn, the optimizer, precision and the step.

    Parts outside `recipe.trainable` get `requires_grad=False` and no optimizer state, so they
    stay bit-identical. The step is the same for any number of ranks and way of sharing
    (`recipe.parallel`). Raises ValueError when nothing is trainable.
    """

    def __init__(
        self,
        model: SailVLForConditionalGeneration,
        recipe: TrainRecipe,
        world: World | None = None,
    ) -> None:
        self.world = world or join_world()
        degree = recipe.expert_parallel if self.world.size > 1 else 1
        spread = spread_experts(model, degree, self.world) if degree > 1 else None
        self.model, self.recipe = model, recipe
        freeze_except(model, recipe.trainable)
        if recipe.activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        self._top_k = model.config.text_config.num_experts_per_tok if model.config.is_moe else 0
        kind = Muon if recipe.optimizer == "muon" else torch.optim.AdamW
        optimizer = kind(self._groups(), lr=recipe.lr, betas=recipe.betas, fused=True)
        self.learner = make_learner(model, optimizer, recipe, self.world, spread)

    def _groups(self) -> list[dict[str, object]]:
        """Per part: hidden matrices, embeddings (both with weight decay), vectors (without).

        Matrices and embeddings differ for Muon only, which a ViT does without: at the low rate
        that keeps it from forgetting they cost time, and one comparison showed no gain.
        """
        groups: list[dict[str, object]] = []
        for part, module in self.model.parts().items():
            rates = {str(name): rate for name, rate in self.recipe.part_lr.items()}
            lr_scale = rates.get(part, self.recipe.lr) / self.recipe.lr
            learning = [p for p in module.parameters() if p.requires_grad]
            tables = {id(p) for p in _embeddings(module)}
            hidden = [p for p in learning if p.dim() == 2 and id(p) not in tables]
            other = [p for p in learning if p.dim() > 2 or id(p) in tables]
            for decay, chosen in (
                (self.recipe.weight_decay, hidden),
                (self.recipe.weight_decay, other),
                (0.0, [p for p in learning if p.dim() < 2]),
            ):
                if chosen:
                    groups.append(
                        {
                            "params": chosen,
                            "weight_decay": decay,
                            "name": part,
                            "lr_scale": lr_scale,
                            "muon": chosen is hidden
                            and part != "vision"
                            and self.recipe.optimizer == "muon",
                        }
                    )
        if not groups:
            raise ValueError(f"nothing to train: trainable is {self.recipe.trainable}")
        return groups

    def step(
        self,
        rows: Sequence[Sequence[Encoded]],
        sources: Sequence[Sequence[int]],
        lr: float,
        num_sources: int = 1,
    ) -> StepResult:
        """Forward, backward and update over this rank's packed rows of a global batch.

        The loss is normalised by the labelled tokens (or answers, or samples) of the whole batch,
        so the gradient does not depend on how rows are split into micro-batches and ranks.

        Args:
            rows: As many on every rank.
            sources: The stream source of each sample, below `num_sources`.
            lr: Of this step.
        """
        self.model.train()
        labels = sum(int(e.loss_mask[1:].sum()) for row in rows for e in row)
        num_labels, denominator = self.world.sum([labels, self._denominator(rows)])
        # Per source the sum of losses and their number, then the balance loss.
        totals = np.zeros(2 * num_sources + 1)
        num_micro = math.ceil(len(rows) / self.recipe.micro_batch_size)
        self._router = RouterMeter(self._top_k) if self._top_k else None
        for number, (micro_rows, micro_sources) in enumerate(self._micro_batches(rows, sources)):
            last = number == num_micro - 1
            losses, weights, source_of_label, aux_loss = self._forward(
                micro_rows, micro_sources, last
            )
            loss = (losses * weights).sum() / max(denominator, 1)
            if aux_loss is not None:
                share = aux_loss / (num_micro * self.world.size)
                loss = loss + share
                totals[-1] += float(share.detach())
            if not torch.isfinite(loss):
                loss = loss * math.nan  # then no gradient is finite and no weight is touched
            self.learner.backward(loss, last)
            _accumulate(totals, losses.detach(), source_of_label)
        part_norms = self.learner.part_norms(self.model.parts())
        grad_norm = self.learner.update(lr)
        totals = np.array(self.world.sum(totals.tolist()))
        sums, counts = totals[:-1:2], totals[1::2]
        return StepResult(
            loss=float(sums.sum()) / max(num_labels, 1),
            aux_loss=float(totals[-1]),
            source_loss={i: float(sums[i] / n) for i, n in enumerate(counts) if n},
            grad_norm=grad_norm,
            part_norms=part_norms,
            num_labels=int(num_labels),
            router=self._router.health().summary() if self._router is not None else {},
        )

    def _denominator(self, rows: Sequence[Sequence[Encoded]]) -> float:
        """What the weighted loss of a global batch is divided by."""
        if self.recipe.loss_norm == "sample":
            return sum(len(row) for row in rows)
        shares = [shares_of_turns(e.loss_mask) for row in rows for e in row]
        power = POWERS[self.recipe.loss_norm]
        return sum(float((share[share > 0] ** power).sum()) for share in shares)

    def _micro_batches(
        self, rows: Sequence[Sequence[Encoded]], sources: Sequence[Sequence[int]]
    ) -> Iterator[tuple[Sequence[Sequence[Encoded]], Sequence[Sequence[int]]]]:
        size = self.recipe.micro_batch_size
        for start in range(0, len(rows), size):
            yield rows[start : start + size], sources[start : start + size]

    def _forward(
        self, rows: Sequence[Sequence[Encoded]], sources: Sequence[Sequence[int]], last: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Per-label losses [L], weights [L], source indices [L], and the balance loss."""
        batch = on_device(collate_rows(rows, self.recipe.seq_len), self.world.device)
        output = self.learner.forward(
            last,
            input_ids=batch["input_ids"],
            **batch["images"],
            position_ids=batch["position_ids"],
            attention_mask=batch["segment_ids"],
            labels=batch["labels"],
            use_cache=False,
        )
        if self._router is not None:
            self._router.add(output.router_logits, batch["segment_ids"].reshape(-1) != 0)
        segments = batch["segment_ids"][output.label_rows, output.label_cols]
        width = max(len(row) for row in sources) + 1
        table = torch.zeros(len(rows), width, dtype=torch.long)
        for r, row in enumerate(sources):
            table[r, 1 : len(row) + 1] = torch.tensor(row)
        table = table.to(self.world.device)
        shares = batch["turn_shares"][output.label_rows, output.label_cols]
        weights = shares ** POWERS[self.recipe.loss_norm]
        return output.loss_per_token, weights, table[output.label_rows, segments], output.aux_loss


def make_learner(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Optimization,
    world: World,
    spread: Spread | None = None,
) -> Learner:
    """Plain torch for one rank or `ddp`; DeepSpeed where ranks share state or the host keeps it.

    The model moves to the rank's device here. DeepSpeed moves it itself, after rounding to bf16: a
    GPU that holds a share in training need not hold all of it in float32 before.

    Args:
        spread: How the model's experts are, if ranks hold shares of them (`ddp` only).
    """
    plain: dict[str, Any] = {"clip_norm": recipe.clip_norm, "dtype": recipe.dtype}
    if spread is not None:
        return ExpertParallelLearner(model.to(world.device), optimizer, world, spread, **plain)
    if recipe.parallel == "ddp" or (world.size == 1 and not recipe.offload):
        return Learner(model.to(world.device), optimizer, world, **plain)
    # Imported only here: DeepSpeed takes seconds, and most runs on one rank never need it.
    from training.zero import ZeroLearner

    return ZeroLearner(model, optimizer, recipe, world)


def _embeddings(module: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """Token and position tables, and an output head that is not tied to them."""
    for name, child in module.named_modules():
        if isinstance(child, torch.nn.Embedding) or name.endswith("lm_head"):
            yield from child.parameters()


def _accumulate(totals: np.ndarray, losses: torch.Tensor, source_of_label: torch.Tensor) -> None:
    for source in source_of_label.unique().tolist():
        chosen = losses[source_of_label == source]
        totals[2 * source] += float(chosen.sum())
        totals[2 * source + 1] += len(chosen)
