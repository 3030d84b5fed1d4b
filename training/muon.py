"""Muon for the hidden matrices, AdamW for the rest, as one optimizer.

The momentum of a matrix is orthogonalised before it is applied (Keller Jordan et al., 2024), with
the update's RMS matched to AdamW's so that one learning rate serves both (Liu et al., 2025,
arXiv:2502.16982, section 2.2). `torch.optim.Muon` does the same in bfloat16 and one matrix at a
time, which on CPUs without bfloat16 units makes a small network's step three times as long
(docs/log.md); here matrices of one shape go through the iteration together, in float32.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

# Quintic Newton-Schulz coefficients of the original implementation: fast rather than exact.
A, B, C = 3.4445, -4.775, 2.0315
ITERATIONS = 5
MOMENTUM = 0.95
RMS_OF_ADAMW = 0.2


def orthogonalised(stack_KMN: torch.Tensor) -> torch.Tensor:
    """Singular values of each [M, N] matrix of the stack, M <= N, brought near 1.

    All-zero matrices stay zero.
    """
    x = stack_KMN / (stack_KMN.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x


class Muon(torch.optim.AdamW):
    """AdamW whose parameter groups with `"muon": True` take orthogonalised steps instead.

    Such groups hold 2-D parameters only. State is one momentum tensor a matrix.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update. `closure` is not supported."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            if group.get("muon"):
                self._step_matrices(group)
        super().step()

    def _step_matrices(self, group: dict[str, Any]) -> None:
        alike: dict[tuple[int, ...], list[torch.Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                alike[tuple(sorted(parameter.shape))].append(parameter)
        for parameters in alike.values():
            updates = orthogonalised(torch.stack([self._direction(p) for p in parameters]))
            for parameter, update in zip(parameters, updates, strict=True):
                wide = parameter.shape[0] <= parameter.shape[1]
                scale = RMS_OF_ADAMW * max(parameter.shape) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update if wide else update.T, alpha=-group["lr"] * scale)
                parameter.grad = None  # done: AdamW skips what has no gradient

    def _direction(self, parameter: torch.Tensor) -> torch.Tensor:
        """Nesterov momentum of the gradient, transposed to be no taller than wide."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
        direction = parameter.grad.lerp(state["momentum"], MOMENTUM)
        return direction if parameter.shape[0] <= parameter.shape[1] else direction.T
