"""ZeRO-1, 2 and 3 by DeepSpeed: ranks share optimizer state, gradients and weights.

With dtype float32 a recipe's loss curve is that of plain torch. With bfloat16 ranks hold weights in
bf16 and their slice of float32 master weights, where plain torch holds float32 under autocast: half
the memory, and losses that agree to bf16's precision. Only DeepSpeed's parts are used that keep no
files: its checkpoints are pickles, ours are tensors by name that any number of ranks can load.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

# DeepSpeed chooses its accelerator when it is first imported.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from sailyard.recipe import Optimization
from training.learner import STEP, Learner, checked, copied, exchanged, rebuilt
from training.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")

# On CPUs DeepSpeed would compile a shared-memory all-reduce, which needs a compiler and half a
# minute; gloo does the same.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class ZeroLearner(Learner):
    """A model and AdamW in a DeepSpeed engine.

    Raises ValueError for an optimizer other than AdamW: Muon needs whole matrices, and ranks hold
    slices of them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        recipe: Optimization,
        world: World,
    ) -> None:
        if type(optimizer) is not torch.optim.AdamW:
            raise ValueError(
                f"parallel is {recipe.parallel}, which shares optimizer state in slices, and "
                f"{type(optimizer).__name__} needs whole matrices: set optimizer to adamw, or "
                "parallel to ddp"
            )
        self.model, self.world = model, world
        self.clip_norm, self.dtype = recipe.clip_norm, recipe.dtype
        self.stage = int(recipe.parallel.removeprefix("zero"))
        self._half = recipe.dtype == "bfloat16"
        # DeepSpeed rounds every weight to bf16 and keeps float32 only of those that learn.
        self._frozen = {
            name: copied(parameter, None)
            for name, parameter in model.named_parameters()
            if self._half and not parameter.requires_grad and (self._mine(name) or self._first)
        }
        exact = {n: p.detach() for n, p in model.named_parameters() if self._half}
        self._engine, self._sharded, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=self._config(recipe),
            dist_init_required=False,
        )
        self.optimizer = self._sharded.optimizer
        self._make_states()
        for name, parameter in model.named_parameters() if self._half else ():
            if parameter.requires_grad:  # whose master DeepSpeed made of the rounded weights
                self._set_master(parameter, exact.pop(name))

    def _config(self, recipe: Optimization) -> dict[str, Any]:
        zero: dict[str, Any] = {
            "stage": self.stage,
            "overlap_comm": self.world.device.type != "cpu",
        }
        if recipe.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        return {
            "train_micro_batch_size_per_gpu": recipe.micro_batch_size,
            "gradient_accumulation_steps": 1,  # the boundary is set by hand
            "gradient_clipping": recipe.clip_norm,
            "zero_allow_untested_optimizer": True,
            # DeepSpeed's own CPU Adam is compiled on first use; torch's fused one is as exact.
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero,
            "bf16": {"enabled": self._half},
            "data_types": {"grad_accum_dtype": "fp32"},
        }

    def forward(self, last: bool, **inputs: Any) -> Any:
        self._engine.set_gradient_accumulation_boundary(last)
        return self._engine(**inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        self._engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def update(self, lr: float) -> float:
        """As in plain torch: DeepSpeed, too, leaves a step out whose norm is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return math.inf if norm is None else float(norm)

    def part_norms(self, parts: Mapping[str, nn.Module]) -> dict[str, float]:
        """None: the gradients lie in slices that do not end where parts do."""
        return {}

    def tensors(
        self, *, frozen: bool = True, into: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        old, found = into or {}, {}

        def keep(name: str, key: str, value: Tensor) -> None:
            # Every rank takes part in gathering, one keeps the result.
            if self._mine(name):
                found[key] = copied(value, old.get(key))

        step = next(iter(self.optimizer.state.values()))[STEP].reshape(1)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                keep(name, f"model/{name}", safe_get_full_fp32_param(parameter))
                for entry in MOMENTS:
                    moment = safe_get_full_optimizer_state(parameter, entry)
                    keep(name, f"optimizer/{name}/{entry}", moment)
                keep(name, f"optimizer/{name}/{STEP}", step)
            elif frozen and self._half:
                if self._mine(name):
                    found[f"model/{name}"] = self._frozen[name]
            elif frozen:
                with self._gathered(parameter):
                    keep(name, f"model/{name}", parameter)
        for name, buffer in self.model.named_buffers() if frozen else ():
            keep(name, f"model/{name}", buffer)
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        named = dict(self.model.named_parameters())
        buffers = dict(self.model.named_buffers())
        for key, value in exchanged(tensors, self.world):
            kind, _, name = key.partition("/")
            if kind == "model" and name in buffers:
                checked(buffers, name, value).copy_(value)
            elif kind == "model":
                self._set_weight(named, name, value)
                if named[name].requires_grad:
                    self._set_master(named[name], value)
                elif name in self._frozen:
                    self._frozen[name].copy_(value)
            else:
                name, _, entry = name.rpartition("/")
                if name not in named:
                    raise ValueError(f"the model has no parameter {name!r} to optimize")
                if entry == STEP:
                    for state in self.optimizer.state.values():
                        state[STEP].copy_(value[0])
                else:
                    self._set_master(named[name], value, entry)

    def whole(self) -> nn.Module:
        """The model with all its weights in float32; where that is a new one, on rank 0 alone."""
        if self.stage < 3 and not self._half:
            return self.model
        weights: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                full = safe_get_full_fp32_param(parameter)
                if self._first:
                    weights[name] = copied(full, None)
            elif self._half:
                if self._first:
                    weights[name] = self._frozen[name]
            else:
                with self._gathered(parameter):
                    if self._first:
                        weights[name] = copied(parameter, None)
        if not self._first:
            return self.model
        return rebuilt(self.model, weights)

    @property
    def _first(self) -> bool:
        return self.world.rank.number == 0

    def _set_weight(self, named: Mapping[str, nn.Parameter], name: str, value: Tensor) -> None:
        if name not in named:
            raise ValueError(f"tensor {name!r} is missing from the model")
        with self._gathered(named[name], modifier_rank=0), torch.no_grad():
            # Outside this block a ZeRO-3 parameter is empty.
            checked({name: named[name].detach()}, name, value).copy_(value)

    def _set_master(self, parameter: nn.Parameter, value: Tensor, moment: str = "") -> None:
        """A float32 master or a moment, of which each rank takes its slice."""
        if self.stage == 3:
            # DeepSpeed's own way takes no value whose size the ranks do not divide.
            size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            padded = nn.functional.pad(value.flatten(), (0, size * self.world.size - value.numel()))
            part = padded[size * self.world.rank.number :][:size]
            if moment:
                safe_set_local_optimizer_state(parameter, part, moment)
            else:
                safe_set_local_fp32_param(parameter, part)
        elif moment:
            safe_set_full_optimizer_state(parameter, value, moment)
        else:
            safe_set_full_fp32_param(parameter, value)

    @contextmanager
    def _gathered(
        self, parameter: nn.Parameter, modifier_rank: int | None = None
    ) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank):
            yield

    def _make_states(self) -> None:
        """Moments of zero, as the first step would make them: a checkpoint may come before."""
        if self.stage == 3:  # which leaves the optimizer's own groups empty between steps
            flats = self._sharded.fp32_partitioned_groups_flat
        else:
            flats = [flat for group in self.optimizer.param_groups for flat in group["params"]]
        for flat in flats:
            self.optimizer.state[flat] = {
                STEP: torch.zeros((), device=flat.device),
                **{key: torch.zeros_like(flat) for key in MOMENTS},
            }
        if self.stage < 3:
            # DeepSpeed makes this link after the step of its first parameter group, when the
            # others have no state yet.
            self._sharded._lazy_init_hp_params_optimizer_state()
