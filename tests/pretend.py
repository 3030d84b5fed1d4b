"""A device that is not the CPU: `DEVICE` keeps its tensors in the CPU's memory, and says otherwise.

Without a GPU nothing else shows that a tensor was left behind on the CPU: as on one, operations
on tensors of both fail, and `numpy()` does. Autocast does nothing on it. Importing this changes
torch for the whole process, so tests run it in one of their own.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)


class _Module(_DummyBackendModule):
    """What torch asks a device's module for."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: object = None) -> Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        pass

    def device(self, index: int) -> Any:
        return nullcontext()


_setup_privateuseone_for_python_backend("pretend", backend_module=_Module())
# A module's weights change their kind when they move; swapped, tied ones stay tied, as on a GPU.
torch.__future__.set_swap_module_params_on_conversion(True)
DEVICE = torch.device("pretend", 0)

# These take indices from the CPU on a GPU, too.
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
MOVES = {"aten::_to_copy", "aten::to"}
BETWEEN_DEVICES = {"aten::copy_", "aten::_copy_from", *MOVES}


class Pretended(torch.Tensor):
    """A tensor of the device, around the one on the CPU that holds its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        with torch.inference_mode(False):  # a view of a weight is no inference tensor
            made: Pretended = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                inner.shape,
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=DEVICE,
            )
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.inner} on {DEVICE}"

    def __format__(self, spec: str) -> str:
        return format(self.inner, spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copy = Pretended(self.inner.clone())
            is_weight = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if is_weight else copy
        found: Tensor = memo[id(self)]
        return found

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, *args, **(kwargs or {}))


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation on the values, its result on the device."""
    name = func._schema.name
    flat = tree_flatten((args, kwargs))[0]
    tensors = [t for t in flat if isinstance(t, Tensor)]
    ours = [t for t in tensors if isinstance(t, Pretended)]
    if ours and name not in BETWEEN_DEVICES:
        bound = [args[0], *args[2:3]] if name in INDEXING else tensors
        strict = name.startswith("aten::_fused")  # elsewhere a single number may be the CPU's
        others = [t for t in bound if isinstance(t, Tensor) and not isinstance(t, Pretended)]
        left = [t for t in others if strict or t.dim()]
        if left:
            raise RuntimeError(f"{name}: tensors on {DEVICE} and on {left[0].device}")
    wanted = next((value for value in flat if isinstance(value, torch.device)), None)
    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    if name == "aten::histc":  # takes no integers on the CPU, and only those on a GPU
        inner_args = (inner_args[0].float(), *inner_args[1:])
    result = func(*inner_args, **inner_kwargs)
    if name == "aten::histc":
        result = result.to(args[0].dtype)
    if name in MOVES and wanted is not None and wanted.type == "cpu":
        return result.clone() if result is inner_args[0] else result
    own = {id(_inner(t)): t for t in tensors}  # what is changed in place stays the same tensor
    return tree_map(lambda t: _wrapped(t, own), result)


def _inner(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.inner if isinstance(value, Pretended) else value


def _wrapped(value: Any, own: dict[int, Tensor]) -> Any:
    if not isinstance(value, Tensor):
        return value
    return own[id(value)] if id(value) in own else Pretended(value)


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _inner(target).copy_(_inner(source))
    return target


_everything = torch.library.Library("_", "IMPL")
_everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
_everything.fallback(_run, "PrivateUse1")
_aten = torch.library.Library("aten", "IMPL")
_aten.impl("_copy_from", _copy_from, "PrivateUse1")
