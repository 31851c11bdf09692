"""How operators move the numbers of channels (see `follower`), each as it moves the values.

What only moves values moves numbers in the same way, whatever it is. Where two channels meet in one element they must
go together, and where one meets a constant it must stay. What an operator without a rule reads must stay, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pqk.data.structures import tensors
from pqk.passes.prune.labels import every, narrowed, padded, varies
from pqk.passes.prune.numbering import PADDED, Numbering


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


MOVES = _names(
    """
    view _unsafe_view reshape permute transpose t expand unsqueeze squeeze slice select split split_with_sizes
    unsafe_split unsafe_split_with_sizes unbind cat stack clone alias detach lift_fresh flip roll index_select index
    gather repeat pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle as_strided unfold im2col
    reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
    _reshape_alias contiguous narrow diagonal movedim tril triu
    """
)
SPATIAL = _names(
    """
    max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices mkldnn_max_pool2d avg_pool1d
    avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d
    _upsample_nearest_exact1d _upsample_nearest_exact2d upsample_bilinear2d _upsample_bilinear2d_aa
    upsample_linear1d upsample_bicubic2d _upsample_bicubic2d_aa upsample_trilinear3d grid_sampler_2d grid_sampler_3d
    """
)
"""[N, C, …] -> [N, C, …], channel by channel"""
REDUCTIONS = _names(
    """
    sum mean amax amin max min prod var std var_mean std_mean logsumexp linalg_vector_norm norm argmax argmin any
    all _softmax _log_softmax softmax log_softmax cumsum cumprod
    """
)
POINTWISE = _names(
    """
    rrelu log_sigmoid_forward prelu _prelu_kernel native_dropout dropout celu glu_jvp
    """
)
"""those that torch does not tag as such"""
EMPTY = _names(
    """
    empty zeros ones full empty_like zeros_like ones_like full_like new_empty new_zeros new_ones new_full
    empty_strided new_empty_strided
    """
)
"""tensors that others may be written into"""


class OperatorRules:
    """Gives the results of operators their numbers."""

    def __init__(self, numbers: Numbering) -> None:
        self.numbers = numbers

    def apply(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """`func` was called and returned `output`."""
        read = tensors([*args, *kwargs.values()])
        try:
            self._operator(func, args, kwargs, read, output)
        except Exception as error:  # a form of an operator that its rule does not expect
            self._unknown(func, read, f": {type(error).__name__}")

    def _operator(self, func: Any, args: Any, kwargs: Any, read: list[Tensor], output: Any) -> None:
        name = func.overloadpacket.__name__
        plain = name.rstrip("_") if not name.startswith("__") else name.strip("_")
        if plain in EMPTY:
            return self.numbers.put(output, torch.zeros_like(output, dtype=torch.int32))
        if all(self.numbers.of(t) is None for t in read):
            return None
        if plain == "copy":
            return self._write(args[0], self.numbers.of(args[1]))
        if plain in ("fill", "zero"):
            return self._write(args[0], None)
        if plain in MOVES or plain in ("_to_copy", "constant_pad_nd", "glu"):
            return self._moved(func, plain, args, kwargs, output)
        if plain in ("mm", "bmm", "addmm", "baddbmm"):
            return self._product(
                args[-2], args[-1], args[0] if plain.startswith("add") or "badd" in plain else None, output
            )
        if "scaled_dot_product" in plain:
            return self._attention(args, kwargs, output[0])
        if plain in SPATIAL:
            return self.spatial(args[0], output[0] if isinstance(output, tuple) else output)
        if plain in REDUCTIONS:
            return self._reduced(plain, func, args, kwargs, output)
        if plain == "native_layer_norm":
            axes = [*range(-len(args[1]), 0)]
            return self._over(args[0], axes, output[0], "a norm takes its statistics over them")
        if torch.Tag.pointwise in func.tags or plain in POINTWISE:
            return self._pointwise(read, output[0] if isinstance(output, tuple) else output, name.endswith("_"))
        return self._unknown(func, read)

    def _unknown(self, func: Any, read: list[Tensor], why: str = "") -> None:
        for tensor in read:
            self.numbers.keep(
                self.numbers.of(tensor), f"they go through {func}, which pqk cannot follow{why}{self.numbers.where()}"
            )

    def _write(self, target: Tensor, labels: Tensor | None) -> None:
        """Values are written over those of `target`, which may be a part of another tensor."""
        own = self.numbers.labels.get(id(target))
        if own is not None:
            own.copy_(torch.zeros_like(own) if labels is None else labels.expand_as(own))
        elif labels is not None and target._base is None:
            self.numbers.put(target, labels.expand(target.shape).clone())
        else:
            self.numbers.keep(labels, "they are written into a part of what has no channels" + self.numbers.where())

    def _moved(self, func: Any, plain: str, args: Any, kwargs: Any, output: Any) -> None:
        if isinstance(args[0], list | tuple):  # joined
            sources = [self.numbers.or_zeros(t) for t in args[0]]
            return self.numbers.put(output, _as_values(func, plain, sources, args[1:], kwargs))
        source = self.numbers.or_zeros(args[0])
        if plain in ("_to_copy", "clone"):
            return self.numbers.put(output, source.clone())
        if plain == "glu":
            one, other = source.chunk(2, args[1] if len(args) > 1 else kwargs.get("dim", -1))
            self.numbers.meet(one, other)
            return self.numbers.put(output, torch.maximum(one, other))
        if plain == "constant_pad_nd":
            return self.numbers.put(output, padded(source, args[1]))
        parts = tensors(_as_values(func, plain, source, args[1:], kwargs))
        for tensor, labels in zip(tensors(output), parts, strict=True):
            if plain != "index" or labels.any():
                self.numbers.put(tensor, labels)
        return self._parts(plain, source, args, parts)

    def _parts(self, plain: str, source: Tensor, args: Any, parts: list[Tensor]) -> None:
        """Equal parts of an axis must stay equal."""
        if "split" in plain and len({p.shape for p in parts}) == 1:
            self.numbers.even(torch.stack(narrowed(parts)).flatten(1))
        elif plain == "slice":
            values: list[Any] = list(args[1:]) + [0, 0, None, 1][len(args) - 1 :]
            axis, start, _, step = values
            size, length = source.shape[axis], parts[0].shape[axis]
            start, axis = (start or 0) % size, axis % source.ndim
            if 1 < length < size and size % length == 0 and varies(source, axis):
                if step > 1 and size // length == step:
                    parts = [source.narrow(axis, i, size - i)[every(axis, step)] for i in range(step)]
                    self.numbers.even(torch.stack(narrowed(parts)).flatten(1))
                elif step == 1 and start % length == 0:
                    self.numbers.even(torch.stack(narrowed(source.split(length, axis))).flatten(1))
        elif "shuffle" in plain and "channel" in plain:
            self.numbers.even(torch.stack(narrowed(source.chunk(args[1], 1))).flatten(1))
        elif plain in ("view", "_unsafe_view", "reshape", "_reshape_alias"):
            (narrow,), (before,) = narrowed(parts), narrowed([source])
            axes = [a for a, n in enumerate(narrow.shape) if n > 1]
            if len(axes) > sum(n > 1 for n in before.shape):
                self.numbers.even(narrow.reshape(-1, narrow.shape[axes[-1]]))

    def _product(self, a: Tensor, b: Tensor, bias: Tensor | None, output: Tensor) -> None:
        """[…, i, k] times […, k, j]: channels along k meet, those along i and j go on."""
        one, other = self.numbers.or_zeros(a), self.numbers.or_zeros(b)
        of_rows, of_columns = one[..., :1], other[..., :1, :]
        inner = [varies(one, -1), varies(other, -2)]
        if all(inner):
            for labels, kept, axis in ((one, one.amax(-2, True), -2), (other, other.amax(-1, True), -1)):
                if varies(labels, axis):
                    self.numbers.same(kept.expand_as(labels)[labels != 0], labels[labels != 0])
            self.numbers.meet(one.amax(-2), other.amax(-1))
        elif any(inner):
            self.numbers.keep(
                one if inner[0] else other, "they are multiplied by a matrix that is no layer" + self.numbers.where()
            )
        rows = torch.zeros_like(of_rows) if inner[0] else of_rows
        columns = torch.zeros_like(of_columns) if inner[1] else of_columns
        rows, columns = rows.expand(output.shape), columns.expand(output.shape)
        if ((rows != 0) & (columns != 0)).any():
            self.numbers.keep(rows, PADDED + self.numbers.where())
            self.numbers.keep(columns, PADDED + self.numbers.where())
        self.numbers.put(output, torch.maximum(rows, columns))
        if bias is not None:
            self._pointwise([output, bias], output, True)

    def _attention(self, args: Any, kwargs: Any, output: Tensor) -> None:
        for x in args[:2]:
            if (labels := self.numbers.of(x)) is not None and varies(labels, -1):
                self.numbers.keep(labels, "an attention is scaled by how many they are" + self.numbers.where())
        values = self.numbers.or_zeros(args[2])
        if varies(values, -2):
            return self.numbers.keep(values, "an attention reads them as positions" + self.numbers.where())
        return self.numbers.put(output, values[..., :1, :].expand(output.shape).clone())

    def spatial(self, x: Tensor, output: Tensor) -> None:
        """`output` is `x` with other sizes behind its channels."""
        labels = self.numbers.of(x)
        if labels is None:
            return None
        axis = 0 if x.ndim < output.ndim or (varies(labels, 0) and not varies(labels, 1)) else 1
        if x.shape[axis] != output.shape[axis] or any(varies(labels, a) for a in range(x.ndim) if a != axis):
            return self.numbers.keep(labels, "they are pooled or resized" + self.numbers.where())
        (narrow,) = narrowed([labels])
        return self.numbers.put(output, narrow.expand(output.shape).clone())

    def _reduced(self, plain: str, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        names = [a.name for a in func._schema.arguments]
        values = dict(zip(names, args, strict=False)) | kwargs
        axes = values.get("dim")
        axes = [*range(args[0].ndim)] if axes is None or axes == [] else [axes] if isinstance(axes, int) else [*axes]
        what = "" if plain == "sum" else f"{plain.strip('_')} is taken over them"
        for result in tensors(output):
            self._over(args[0], axes, result, what, keepdim=bool(values.get("keepdim", False)))

    def _over(self, x: Tensor, axes: list[int], output: Tensor, what: str, keepdim: bool = False) -> None:
        """`output` sums, or normalizes, over `axes` of x. Branches that are stacked are joined, channels summed up."""
        labels = self.numbers.of(x)
        if labels is None:
            return
        axes = sorted(a % x.ndim for a in axes)
        left = labels
        for axis in axes:
            left = left.amax(axis, keepdim=True)
        if any(varies(labels, a) for a in axes):
            if any(varies(labels, a) for a in range(x.ndim) if a not in axes):
                self.numbers.same(left.expand_as(labels)[labels != 0], labels[labels != 0])
            else:
                if what:
                    self.numbers.keep(labels, what + self.numbers.where())
                left = torch.zeros_like(left)
        if output.shape == x.shape:
            self.numbers.put(output, left.expand(output.shape).clone() if left.any() else None)
        elif left.any():
            self.numbers.put(output, left.reshape(output.shape).clone())

    def _pointwise(self, read: list[Tensor], output: Tensor, in_place: bool) -> None:
        labelled: Tensor | None = None
        fixed = []
        for tensor in read:
            labels = self.numbers.of(tensor)
            if labels is None or not labels.any():
                fixed.append(tensor)
                continue
            labels = labels.expand(output.shape)
            if labelled is None:
                labelled = labels
            elif labels is not labelled:
                self.numbers.meet(labelled, labels)
                labelled = torch.maximum(labelled, labels)
        if labelled is None:
            return
        for tensor in fixed:
            axes = range(-tensor.ndim, 0)
            if tensor.numel() > 1 and any(tensor.shape[a] > 1 and varies(labelled, a) for a in axes):
                self.numbers.keep(labelled, self._constant(tensor) + self.numbers.where())
        if in_place:
            self._write(output, labelled.clone())
        else:
            self.numbers.put(output, labelled.clone())

    def _constant(self, tensor: Tensor) -> str:
        if (name := self.numbers.bare.get(id(tensor))) is not None:
            return f'the bare parameter "{name}" has these channels, and not on its last axis'
        return "a value with a fixed size has these channels too"


def _as_values(func: Any, plain: str, source: Any, rest: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The operator on numbers in place of values. Not every kernel takes integers, nor every view their strides."""
    try:
        return func(source, *rest, **kwargs)
    except RuntimeError:
        if plain in ("view", "_unsafe_view"):
            return source.reshape(rest[0])
        return func(source.double(), *rest, **kwargs).to(torch.int32)
