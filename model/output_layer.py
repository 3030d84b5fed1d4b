"""The output layer, which makes losses of labelled tokens without holding all their logits.

A row of 8,192 text tokens has 1.2 billion logits at Qwen3's vocabulary: 5 GB in float32, and as
much again for their gradient. Here they are made a block of tokens at a time and made again in the
backward pass, which costs one more product of the output layer where there is more than one block.

Shape suffixes: M labelled tokens, D decoder width, V vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# Logits that exist at a time: 0.5 GB in float32, 883 tokens of Qwen3's vocabulary. Our choice.
LOGITS_AT_ONCE = 2**27


class OutputLayer(nn.Linear):
    """Logits, as any linear layer; or, with targets, losses.

    The losses are made inside the layer's own forward pass, not around it: under ZeRO-3 its weights
    are there during that call only, and ranks with different numbers of labels must call it
    equally often.
    """

    def forward(
        self,
        hidden: torch.Tensor,
        targets_M: torch.Tensor | None = None,
        temperature: float = 1.0,
    ) -> torch.Tensor:
        """[..., V] logits of [..., D]; with targets the losses of [M, D], [M] float32."""
        if targets_M is None:
            return super().forward(hidden)
        size = max(1, LOGITS_AT_ONCE // self.out_features)
        if len(targets_M) <= size:
            return self._losses(hidden, targets_M, temperature)
        blocks = [
            checkpoint(
                self._losses,
                rows,
                targets,
                temperature,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for rows, targets in zip(hidden.split(size), targets_M.split(size), strict=True)
        ]
        return torch.cat(blocks)

    def _losses(
        self, hidden_MD: torch.Tensor, targets_M: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        logits_MV = F.linear(hidden_MD, self.weight, self.bias).float()
        if temperature != 1.0:
            logits_MV = logits_MV / temperature
        return F.cross_entropy(logits_MV, targets_M, reduction="none")


def token_losses(
    linear: nn.Linear,
    hidden_MD: torch.Tensor,
    targets_M: torch.Tensor,
    temperature: float = 1.0,
) -> torch.Tensor:
    """-log softmax(linear(hidden) / temperature) at the targets: [M] float32, differentiable.

    Args:
        linear: a decoder's output layer; it becomes an `OutputLayer`, with the same weights.
        hidden_MD: [M, D], the final hidden states of the tokens before the labelled ones.
        targets_M: [M] int64.
        temperature: what the logits are divided by.
    """
    linear.__class__ = OutputLayer
    return cast(torch.Tensor, linear(hidden_MD, targets_M, temperature))
