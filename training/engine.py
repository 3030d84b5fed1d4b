"""One optimizer step over packed rows, the same whatever the micro-batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from model.modeling import SailVLForConditionalGeneration, freeze_except
from model.processor import Encoded
from sailyard.recipe import TrainRecipe
from training.muon import Muon
from training.packing import collate_rows, shares_of_turns

# A token weighs (1 / length of its answer) to this power.
POWERS = {"token": 0.0, "sample": 0.0, "square": 0.5, "turn": 1.0}


class NonFiniteLoss(FloatingPointError):
    """The loss or gradient of a step is not a number; the message names the step's samples."""


@dataclass(slots=True)
class StepResult:
    """What one optimizer step measured."""

    loss: float  # mean cross-entropy per labelled token, nats
    aux_loss: float  # MoE balance loss, 0 for dense models
    source_loss: dict[int, float]  # mean loss per stream source
    grad_norm: float  # before clipping
    num_labels: int


class Engine:
    """Owns which parts learn, the optimizer, precision and the step.

    Parts outside `recipe.trainable` get `requires_grad=False` and no optimizer state, so they
    stay bit-identical. Raises ValueError when nothing is trainable.
    """

    def __init__(self, model: SailVLForConditionalGeneration, recipe: TrainRecipe) -> None:
        self.model, self.recipe = model, recipe
        freeze_except(model, recipe.trainable)
        kind = Muon if recipe.optimizer == "muon" else torch.optim.AdamW
        self.optimizer = kind(self._groups(), lr=recipe.lr, betas=recipe.betas, fused=True)
        self.autocast = recipe.dtype == "bfloat16"

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
        self, rows: Sequence[Sequence[Encoded]], sources: Sequence[Sequence[int]], lr: float
    ) -> StepResult:
        """Forward, backward and update over a global batch of packed rows.

        The loss is normalised by the labelled tokens (or answers, or samples) of the whole batch,
        so the gradient does not depend on how rows are split into micro-batches.
        Raises NonFiniteLoss before the weights are touched.
        """
        self.model.train()
        num_labels = sum(int(e.loss_mask[1:].sum()) for row in rows for e in row)
        denominator = self._denominator(rows)
        totals: dict[int, list[float]] = {}
        aux_total = 0.0
        num_micro = math.ceil(len(rows) / self.recipe.micro_batch_size)
        for micro_rows, micro_sources in self._micro_batches(rows, sources):
            losses, weights, source_of_label, aux_loss = self._forward(micro_rows, micro_sources)
            loss = (losses * weights).sum() / max(denominator, 1)
            if aux_loss is not None:
                loss = loss + aux_loss / num_micro
                aux_total += float(aux_loss.detach()) / num_micro
            loss.backward()
            _accumulate(totals, losses.detach(), source_of_label)
        grad_norm = self._update(lr)
        loss_sum = sum(t[0] for t in totals.values())
        if not math.isfinite(loss_sum) or not math.isfinite(grad_norm):
            raise NonFiniteLoss(f"loss {loss_sum}, gradient norm {grad_norm}")
        return StepResult(
            loss=loss_sum / max(num_labels, 1),
            aux_loss=aux_total,
            source_loss={s: t[0] / t[1] for s, t in sorted(totals.items())},
            grad_norm=grad_norm,
            num_labels=num_labels,
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
        self, rows: Sequence[Sequence[Encoded]], sources: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Per-label losses [L], weights [L], source indices [L], and the balance loss."""
        batch = collate_rows(rows, self.recipe.seq_len)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            output = self.model(
                input_ids=batch["input_ids"],
                **batch["images"],
                position_ids=batch["position_ids"],
                attention_mask=batch["segment_ids"],
                labels=batch["labels"],
                use_cache=False,
            )
        segments = batch["segment_ids"][output.label_rows, output.label_cols]
        width = max(len(row) for row in sources) + 1
        table = torch.zeros(len(rows), width, dtype=torch.long)
        for r, row in enumerate(sources):
            table[r, 1 : len(row) + 1] = torch.tensor(row)
        shares = batch["turn_shares"][output.label_rows, output.label_cols]
        weights = shares ** POWERS[self.recipe.loss_norm]
        return output.loss_per_token, weights, table[output.label_rows, segments], output.aux_loss

    def _update(self, lr: float) -> float:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.recipe.clip_norm))
        if math.isfinite(grad_norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm


def _embeddings(module: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """Token and position tables, and an output head that is not tied to them."""
    for name, child in module.named_modules():
        if isinstance(child, torch.nn.Embedding) or name.endswith("lm_head"):
            yield from child.parameters()


def _accumulate(
    totals: dict[int, list[float]], losses: torch.Tensor, source_of_label: torch.Tensor
) -> None:
    for source in source_of_label.unique().tolist():
        chosen = losses[source_of_label == source]
        entry = totals.setdefault(source, [0.0, 0.0])
        entry[0] += float(chosen.sum())
        entry[1] += len(chosen)
