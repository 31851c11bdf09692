"""What a network costs on paper: multiply-accumulates, parameters, bytes. Milliseconds are measured elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pqk.core.aten import MULTIPLY, NBITS, aten
from pqk.core.modes import evaluating, frozen, fused_layers
from pqk.errors import InputError, Reason

INTEGER_WEIGHTS = (nn.modules.conv._ConvNd, nn.Linear)
"""modules whose weights are deployed as one byte each"""
NEXT_TO_NONE = 10
"""a count is distrusted where matrices that it left out hold more than one value in so many MACs"""

Size = tuple[int, ...]


# ---- MACs of what torch's own counter takes for free: twice, as it counts multiplications and additions


def _attention(query: Size, key: Size, value: Size, *_: Any, **__: Any) -> int:
    """The products QK' and PV of all heads; query [..., T, D]."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurrent_layer(x: Size, from_input: Size, from_state: Size, *_: Any, **__: Any) -> int:
    """One layer and direction of an LSTM, all its gates; x [T, B, I], weights [gates * H, I] and [gates * H, H]."""
    return 2 * math.prod(x[:-1]) * (math.prod(from_input) + math.prod(from_state))


def _product_of_vectors(left: Size, right: Size, *_: Any, **__: Any) -> int:
    """[N, K] or [K] by [K]."""
    return 2 * math.prod(left)


def _added_product(_: Size, left: Size, right: Size, *__: Any, **___: Any) -> int:
    """A bias beside [N, K] by [K], or beside a sum of products [B, N, K] by [B, K, M]."""
    return 2 * math.prod(left) * (right[-1] if len(right) > 1 else 1)


def _product(left: Size, right: Size, *_: Any, **__: Any) -> int:
    """[..., K] by [K, M]."""
    return 2 * math.prod(left) * right[-1]


def _integer_product(x: Size, _: Size, __: Size, weight: Size, *___: Any, **____: Any) -> int:
    return _product(x, weight)


def _product_in_blocks(x: Size, weight: Size, *_: Any, **__: Any) -> int:
    """[..., K] by packed weights [N, B, ...]."""
    return 2 * math.prod(x) * weight[0]


def _bilinear(x: Size, weight: Size, y: Size, *_: Any, **__: Any) -> int:
    """x [N, I], weight [O, I, J], y [N, J]: x times weight, and that times y."""
    return 2 * x[0] * weight[0] * (x[1] + 1) * y[1]


FORMULAS: Mapping[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
    aten.mkldnn_rnn_layer: _recurrent_layer,
    aten.mv: _product_of_vectors,
    aten.dot: _product_of_vectors,
    aten.vdot: _product_of_vectors,
    aten.addmv: _added_product,
    aten.addbmm: _added_product,
    aten._int_mm: _product,
    aten._trilinear: _bilinear,
    MULTIPLY.overloadpacket: _integer_product,
    NBITS.overloadpacket: _product_in_blocks,
}
LOOKUPS = frozenset({
    aten.embedding, aten.embedding_bag, aten._embedding_bag, aten._embedding_bag_forward_only, aten.index,
    aten._unsafe_index, aten.index_select, aten.gather, aten.take, aten.cat, aten.stack, aten.copy, aten.copy_,
    aten.index_put, aten.index_put_, aten.native_layer_norm, aten._fused_rms_norm, aten.slice_scatter,
    aten.select_scatter,
})  # fmt: skip
"""operators that read a matrix beside an activation and multiply each of its values once at most"""


class _Uncounted(TorchDispatchMode):
    """Notes operators that read a matrix of the model's beside an activation and that no formula counts."""

    def __init__(self, model: nn.Module, counted: Mapping[Any, Any]) -> None:
        super().__init__()
        self.counted = counted
        self.matrices = {storage_of(p): p.numel() for p in model.parameters() if p.dim() > 1}
        self.constants = {storage_of(t): t for t in (*model.parameters(), *model.buffers())}
        self.found: dict[str, dict[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if tensors and all(storage_of(t) in self.constants for t in tensors):  # kept, so that no address comes twice
            self.constants.update({storage_of(t): t for t in tree_leaves(result) if isinstance(t, Tensor)})
        elif not self._is_harmless(func):
            read = {s: self.matrices[s] for t in tensors if (s := storage_of(t)) in self.matrices}
            if read:
                self.found.setdefault(str(func), {}).update(read)
        return result

    def _is_harmless(self, func: Any) -> bool:
        packet = getattr(func, "overloadpacket", None)
        return packet in self.counted or packet in LOOKUPS or torch.Tag.pointwise in getattr(func, "tags", ())


def storage_of(t: Tensor) -> Any:
    """What names the memory of a tensor; views have that of their base."""
    return t.untyped_storage()._cdata if t.layout == torch.strided else id(t)


def count_macs(module: nn.Module, example: tuple[Tensor, ...]) -> int:
    """Multiply-accumulates of convolutions, matrix products, attention and recurrent cells for one sample, in eval.

    `example` is a batch of inputs; its size (first dimension of the first input) is divided out. Raises `InputError`
    for an empty batch.
    """
    return _count(module, example)[0]


def why_not_counted(module: nn.Module, example: tuple[Tensor, ...]) -> Reason | None:
    """Why the MACs of `module` are too few to be relied on: an operator that multiplies by matrices is not counted."""
    macs, uncounted = _count(module, example)
    values = {storage: n for matrices in uncounted.values() for storage, n in matrices.items()}
    if NEXT_TO_NONE * sum(values.values()) <= macs:
        return None
    return (
        f"{macs} MACs a sample are counted, but how often {', '.join(sorted(uncounted))} multiplies by its matrices of "
        f"{sum(values.values())} values cannot be told: numbers and budgets in MACs say nothing of this network; use "
        "parameters_ratio or latency_ratio"
    )


def _count(module: nn.Module, example: tuple[Tensor, ...]) -> tuple[int, dict[str, dict[Any, int]]]:
    if not example or not example[0].ndim or not len(example[0]):
        raise InputError("counting MACs needs example inputs with at least one sample in the first dimension")
    counter = FlopCounterMode(display=False, custom_mapping=dict(FORMULAS))
    uncounted = _Uncounted(module, counter.flop_registry)
    with evaluating(module), frozen(module), fused_layers(False), torch.no_grad(), uncounted, counter:
        module(*example)
    return counter.get_total_flops() // (2 * len(example[0])), uncounted.found


def count_parameters(module: nn.Module) -> int:
    """Number of trainable and frozen parameter values; a shared parameter counts once."""
    return sum(p.numel() for p in module.parameters())


def float_bytes(module: nn.Module) -> int:
    """Bytes of the parameters and buffers in FP32."""
    return 4 * sum(t.numel() for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())


def integer_bytes(module: nn.Module) -> int:
    """Bytes of the INT8 form of a float module: a byte for each value of conv and linear weights and of tables of
    embeddings, four for the biases.

    Batch norm is folded into the convolution before it: it leaves an int32 bias and a float scale for each channel.
    """
    weights = {
        id(m.weight): m.weight.numel() for m in module.modules() if isinstance(m, (*INTEGER_WEIGHTS, nn.Embedding))
    }
    folded = {
        id(p): p.numel()
        for m in module.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
        for p in m.parameters(recurse=False)
    }
    rest = sum(p.numel() for p in module.parameters() if id(p) not in weights and id(p) not in folded)
    return sum(weights.values()) + 4 * (rest + sum(folded.values()))
