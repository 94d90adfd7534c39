"""Arithmetic, memory traffic and live memory of any computation, counted on meta tensors."""

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swifti2v.planning.costs import Count

aten = torch.ops.aten
Kind = Literal["linear", "attention", "convolution"]
KINDS: tuple[Kind, ...] = ("linear", "attention", "convolution")
META = torch.device("meta")


@dataclass
class _Tally:
    flops: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    kernel_bytes: int = 0
    other_bytes: int = 0
    transfer_bytes: int = 0
    live_bytes: int = 0
    peak_bytes: int = 0


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what runs within a ``with`` block, on meta tensors and in inference mode.

    Attention, RMS norm and linear layers count as one kernel each, as on a GPU. The CPU is the host:
    what is computed there is not counted, and what is copied there comes without values.
    ``torch.unique``, whose size depends on values, is taken to find ``num_levels`` of them; a
    decision on a value is taken as for 0, such as "not all tokens are attended to".

    Args:
        num_levels: Distinct values of any tensor that is searched for them.
    """

    def __init__(self, num_levels: int = 2) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._num_levels = num_levels
        self._tally = _Tally()
        self._held: dict[int, weakref.finalize[..., Any]] = {}

    def read(self) -> Count:
        """Return the counts so far."""
        tally = self._tally
        return Count(
            **tally.flops,
            kernel_bytes=tally.kernel_bytes,
            other_bytes=tally.other_bytes,
            peak_bytes=tally.peak_bytes,
            kept_bytes=tally.live_bytes,
            transfer_bytes=tally.transfer_bytes,
        )

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operation and count it; composite ones are taken apart."""
        del types
        kwargs = kwargs or {}
        result: Any
        if func in (aten.copy_.default, aten._to_copy.default):
            result = _copy(func, args, kwargs)
        elif func is aten.scaled_dot_product_attention.default:
            result = args[0].new_empty((*args[0].shape[:-1], args[2].shape[-1]))
        elif func is aten.grid_sampler_2d.default:  # PyTorch derives its shape op by op
            result = args[0].new_empty((*args[0].shape[:2], *args[1].shape[1:3]))
        elif func is aten._local_scalar_dense.default and args[0].device == META:
            return False
        elif func is aten._unique2.default:
            result = _unique(args[0], self._num_levels)
        elif func in (aten.linear.default, aten.rms_norm.default):
            result = func(*args, **kwargs)
        else:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            result = func(*args, **kwargs)
        self._count(func, args, kwargs, result)
        return result

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        known = {_address(tensor) for tensor in inputs}
        new = [tensor for tensor in outputs if _address(tensor) not in known]
        for tensor in new:
            self._hold(tensor)
        devices = {tensor.device for tensor in (*inputs, *outputs)}
        if META not in devices:
            return
        if len(devices) > 1 and func in (aten.copy_.default, aten._to_copy.default):
            self._tally.transfer_bytes += _num_bytes(outputs[0])
            return
        kind = KERNELS.get(func)
        if kind is not None:
            self._tally.flops[kind] += _flops(func, args, outputs[0])
            self._tally.kernel_bytes += sum(map(_num_bytes, (*inputs, *outputs)))
        elif func._schema.is_mutable:
            written = outputs or inputs[:1]
            read = inputs if func not in (aten.copy_.default,) else inputs[1:]
            self._tally.other_bytes += sum(map(_num_bytes, (*read, *written)))
        elif new and func not in UNTOUCHED:
            self._tally.other_bytes += sum(map(_num_bytes, (*inputs, *new)))

    def _hold(self, tensor: Tensor) -> None:
        if tensor.device != META:
            return
        storage = tensor.untyped_storage()
        address, size = id(storage), storage.nbytes()
        if address in self._held:
            return
        self._tally.live_bytes += size
        self._tally.peak_bytes = max(self._tally.peak_bytes, self._tally.live_bytes)
        self._held[address] = weakref.finalize(storage, self._release, address, size)

    def _release(self, address: int, size: int) -> None:
        self._tally.live_bytes -= size
        del self._held[address]


KERNELS: dict[Any, Kind] = {
    aten.scaled_dot_product_attention.default: "attention",
    aten.linear.default: "linear",
    aten._scaled_mm.default: "linear",
    aten.mm.default: "linear",
    aten.bmm.default: "linear",
    aten.addmm.default: "linear",
    aten.baddbmm.default: "linear",
    aten.convolution.default: "convolution",
}
UNTOUCHED = (aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default)
"""Operations that take memory but do not move any."""


def _copy(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Copy between two places, of which one may be the host."""
    source: Tensor = args[1] if func is aten.copy_.default else args[0]
    target = args[0].device if func is aten.copy_.default else kwargs.get("device", source.device)
    if source.device != META or target == META:
        return func(*args, **kwargs)  # type: ignore[no-any-return]
    if func is aten.copy_.default:
        return args[0]  # type: ignore[no-any-return]
    return torch.empty(source.shape, dtype=kwargs.get("dtype", source.dtype), device=target)


def _unique(values: Tensor, num_levels: int) -> tuple[Tensor, Tensor, Tensor]:
    index = values.new_empty(values.shape, dtype=torch.long)
    return values.new_empty(num_levels), index, index.new_empty(0)


def _flops(func: Any, args: Any, output: Tensor) -> int:
    if func is aten.scaled_dot_product_attention.default:
        query, key, value = args[:3]
        heads = query.shape[:-2].numel()
        return int(
            2 * heads * query.shape[-2] * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        )
    if func is aten.convolution.default:
        weight, is_transposed = args[1], args[6]
        places = args[0] if is_transposed else output
        return int(2 * places.numel() * math.prod(weight.shape[1:]))
    has_addend = func in (aten.addmm.default, aten.baddbmm.default)
    inner = args[1 if has_addend else 0].shape[-1]
    return int(2 * output.numel() * inner)


def _address(tensor: Tensor) -> int:
    return id(tensor.untyped_storage())


def _num_bytes(tensor: Tensor) -> int:
    """Bytes that reading or writing ``tensor`` moves: a broadcast value counts once."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def count(run: Callable[[], object], num_levels: int = 2) -> Count:
    """Cost of ``run``, which computes on meta tensors; what it returns is held until the end.

    Args:
        run: Takes and returns meta tensors.
        num_levels: See ``Meter``.
    """
    with torch.inference_mode(), Meter(num_levels) as meter:
        result = run()
        cost: Count = meter.read()
        del result
    return cost
