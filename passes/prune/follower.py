"""Channels followed through one forward pass by labels: what torch-pruning's walk over autograd is checked against.

Every channel that a layer makes has a number of its own, and each tensor of the pass has beside it a tensor of the same
shape with the numbers of its elements. Operators that only move values move the numbers in the same way, whatever they
are: views, splits, flips, shuffles, concatenations. Where two channels meet in one element they must go together, where
one meets a constant it must stay, and an operator that is not known here keeps what goes into it, and only that.

What an element-wise operator joins is one channel in two places. What a split into equal parts joins, or a grouped
convolution, are channels of which each part must lose as many: they are portions of a unit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode

from pqk.core.modes import evaluating
from pqk.data.structures import tensors
from pqk.errors import Reason
from pqk.passes.prune.cuts import Dim, channels_of, is_depthwise
from pqk.passes.prune.labels import ChannelTrace, along, every, narrowed, padded, pairs_of, varies

OPAQUE = (nn.RNNBase, nn.RNNCellBase)
"""modules that mix what they read; their parameters are not cut"""


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
PADDED = "they are padded, sliced or joined with values that are no channels"


def trace_channels(model: nn.Module, example: tuple[Tensor, ...]) -> ChannelTrace:
    """Follows the channels of `model` (unchanged) through one forward pass on `example`, in eval mode."""
    follower = _Follower(model)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole encoder layer shows no channels
    try:
        with evaluating(model), torch.no_grad(), follower.watching(model), follower:
            outputs = tensors(model(*example))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    for output in outputs:
        follower.keep(follower.of(output), "they are channels of the model's output")
    trace = follower.trace
    # channels that are one belong to one unit
    trace.portions.join((n, trace.same.root(n)) for n in list(trace.same.parent))
    return trace


class _Follower(TorchDispatchMode):
    """Moves the numbers of channels as the operators of a pass move the values.

    Layers with channels are seen at their hooks, whatever they compute inside; everything else operator by operator.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trace = ChannelTrace()
        self.labels: dict[int, Tensor] = {}
        """id of a tensor -> its numbers"""
        self.alive: list[Tensor] = []
        """the tensors with numbers: an id belongs to one object only as long as that lives"""
        self.next = 1
        self.inside = 0
        """layers that are being called, whose operators are their own matter"""
        self.stack: list[str] = []
        self.layers = {p: m for p, m in model.named_modules() if p and _has_channels(m)}
        opaque = [p for p, m in model.named_modules() if isinstance(m, OPAQUE)]
        self.owners: dict[int, str] = {}
        self.bare: dict[int, str] = {}
        for name, parameter in model.named_parameters():
            owner = next((p for p in (*self.layers, *opaque) if name.startswith(f"{p}.")), None)
            if owner is None:
                self.bare[id(parameter)] = name
            elif owner in self.layers:
                self.owners[id(parameter)] = owner

    # ---- modules

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Hooks on every module of `model`, within the context."""
        handles = []
        for path, module in model.named_modules():
            layer = path in self.layers or isinstance(module, OPAQUE)
            handles.append(module.register_forward_pre_hook(self._entering(path, layer)))
            leaving = self._leaving(path, layer)
            handles.append(module.register_forward_hook(leaving, with_kwargs=True, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, path: str, layer: bool) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any) -> None:
            self.stack.append(path)
            self.inside += layer

        return enter

    def _leaving(self, path: str, layer: bool) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.inside -= layer
            if layer and not self.inside and output is not None:
                read = tensors([*args, *kwargs.values()])
                try:
                    if path not in self.layers or not read or not isinstance(output, Tensor):
                        raise TypeError("no layer from a tensor to a tensor")
                    self._layer(path, module, read[0], output)
                except Exception:  # a layer that is called as none of its kind is
                    what = f'they are read by the {type(module).__name__} "{path}", whose channels pqk cannot cut'
                    for x in read:
                        self.keep(self.of(x), what)
            self.stack.pop()

        return leave

    def _layer(self, path: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        """A layer was called: numbers of its own come out, those of its input where it keeps channels in place."""
        if isinstance(module, nn.Embedding):
            return self.put(output, along(self._made(path, "out", module.embedding_dim), output, -1))
        linear = isinstance(module, nn.Linear)
        if (isinstance(module, _ConvNd) and not is_depthwise(module)) or linear or hasattr(module, "cut_channels"):
            axis = -1 if linear else -len(module.kernel_size) - 1 if isinstance(module, _ConvNd) else 1
            return self._weighted(path, module, x, output, axis)
        labels = self.of(x)
        if labels is None:
            return None
        axis = -1 if isinstance(module, nn.LayerNorm) else 1
        if isinstance(module, nn.LayerNorm) and x.shape[-1] != channels_of(module, "out"):
            axis = 1  # a norm that first moves its channels to the last axis
        if isinstance(module, nn.LayerNorm) and x.ndim > 1 and x.shape[1] == channels_of(module, "out"):
            axis = axis if varies(labels, axis) else 1
        if x.ndim > 1 and x.shape[axis] == channels_of(module, "out"):
            self._read(path, "out", module, labels, axis)
            if isinstance(module, nn.GroupNorm) and module.num_groups > 1:
                self._even(self.trace.places[path, "out"].view(module.num_groups, -1).T)
        elif channels_of(module, "out") != 1:
            self.keep(labels, f'the {type(module).__name__} "{path}" reads them on another axis than its channels')
        return self.put(output, labels.clone()) if output.shape == x.shape else self._spatial(x, output)

    def _weighted(self, path: str, module: nn.Module, x: Tensor, output: Tensor, axis: int) -> None:
        """A layer that reads channels along `axis` and makes others."""
        labels = self.of(x)
        made = self._made(path, "out", channels_of(module, "out") or 0)
        if labels is not None and not varies(labels, axis) and labels.any() and isinstance(module, nn.Linear):
            rows = labels[..., :1]  # it is applied to positions, and rows of them are the channels
            if any(varies(rows, a) for a in range(rows.ndim - 1)):
                self.keep(made, f'"{path}" is applied to each channel of other layers')
                return self.put(output, rows.expand(output.shape).clone())
        self._read(path, "in", module, labels, axis)
        if isinstance(module, _ConvNd) and module.groups > 1:
            for key in ((path, "in"), (path, "out")):
                self._even(self.trace.places[key].view(module.groups, -1))
        return self.put(output, along(made, output, axis))

    def _made(self, path: str, dim: Dim, count: int) -> Tensor:
        """The numbers of the channels that a layer, or a bare parameter, makes."""
        if (path, dim) not in self.trace.places:
            self.trace.places[path, dim] = torch.arange(self.next, self.next + count, dtype=torch.int32)
            self.trace.makers.add((path, dim))
            self.next += count
        return self.trace.places[path, dim]

    def _read(self, path: str, dim: Dim, module: nn.Module, labels: Tensor | None, axis: int) -> None:
        """A layer reads these channels: all that come in one place are one channel."""
        count = channels_of(module, dim) or 0
        place = torch.zeros(count, dtype=torch.int32)
        if labels is not None:
            (narrow,) = narrowed([labels.movedim(axis, 0)], first=1)
            rows = narrow.reshape(count, -1)
            place = rows.amax(1)
            self._same(place[:, None].expand_as(rows)[rows != 0], rows[rows != 0])
        before = self.trace.places.get((path, dim))
        if before is not None:
            self.meet(before, place)
            place = torch.maximum(before, place)
        self.trace.places[path, dim] = place

    # ---- numbers

    def of(self, tensor: Tensor) -> Tensor | None:
        """The numbers of a tensor's elements; None where none is a channel's."""
        if id(tensor) in self.bare:
            name = self.bare[id(tensor)]
            if tensor.ndim == 0 or tensor.shape[-1] == 1:
                return None
            return along(self._made(name, "values", tensor.shape[-1]), tensor, -1)
        if (path := self.owners.get(id(tensor))) is not None:
            return self._outside(path, tensor)
        return self.labels.get(id(tensor))

    def _outside(self, path: str, weight: Tensor) -> Tensor | None:
        """The parameter of a layer is read by something else than its own call."""
        module = self.layers[path]
        made = self._made(path, "out", channels_of(module, "out") or 0)
        if isinstance(module, nn.Embedding):
            return along(made, weight, -1)
        self.keep(made, f'a parameter of "{path}" is read outside of its own call{self.where()}')
        return None

    def put(self, tensor: Tensor, labels: Tensor | None) -> None:
        """Gives a tensor its numbers."""
        if labels is not None:
            self.labels[id(tensor)] = labels
            self.alive.append(tensor)

    def keep(self, labels: Tensor | None, reason: Reason) -> None:
        """None of these channels can go."""
        if labels is not None:
            (labels,) = narrowed([labels])
            for number in labels.unique().tolist():
                if number:
                    self.trace.kept.setdefault(number, reason)

    def meet(self, one: Tensor, other: Tensor) -> None:
        """Elements meet: channels are one, and one that meets something else must stay."""
        one, other = narrowed([one, other])
        both = (one != 0) & (other != 0)
        self._same(one[both], other[both])
        alone = torch.where(both, 0, torch.maximum(one, other))
        if alone.any():
            self.keep(alone, PADDED + self.where())

    def _same(self, one: Tensor, other: Tensor) -> None:
        self.trace.same.join(pairs_of(one, other))

    def _even(self, parts: Tensor) -> None:
        """Each row of `parts` must lose as many: [rows, places]."""
        for part in parts[1:]:
            both = (part != 0) & (parts[0] != 0)
            self.trace.portions.join(pairs_of(parts[0][both], part[both]))

    def where(self) -> str:
        """The module that is being called, and the line of its code."""
        frame = sys._getframe(1)
        while frame is not None and (_of_torch(frame.f_code.co_filename) or frame.f_code.co_filename == __file__):
            frame = frame.f_back  # type: ignore[assignment]
        path = next((p for p in reversed(self.stack) if p), "")
        line = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame is not None else ""
        return f' (in "{path}", {line})' if path else f" ({line})"

    # ---- operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if not self.inside:
            read = tensors([*args, *kwargs.values()])
            try:
                self._operator(func, args, kwargs, read, output)
            except Exception as error:  # a form of an operator that its rule does not expect
                self._unknown(func, read, f": {type(error).__name__}")
        return output

    def _operator(self, func: Any, args: Any, kwargs: Any, read: list[Tensor], output: Any) -> None:
        name = func.overloadpacket.__name__
        plain = name.rstrip("_") if not name.startswith("__") else name.strip("_")
        if plain in EMPTY:
            return self.put(output, torch.zeros_like(output, dtype=torch.int32))
        if all(self.of(t) is None for t in read):
            return None
        if plain == "copy":
            return self._write(args[0], self.of(args[1]))
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
            return self._spatial(args[0], output[0] if isinstance(output, tuple) else output)
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
            self.keep(self.of(tensor), f"they go through {func}, which pqk cannot follow{why}{self.where()}")

    def _write(self, target: Tensor, labels: Tensor | None) -> None:
        """Values are written over those of `target`, which may be a part of another tensor."""
        own = self.labels.get(id(target))
        if own is not None:
            own.copy_(torch.zeros_like(own) if labels is None else labels.expand_as(own))
        elif labels is not None:
            self.put(target, labels.expand(target.shape).clone())

    def _moved(self, func: Any, plain: str, args: Any, kwargs: Any, output: Any) -> None:
        first = args[0]
        many = isinstance(first, list | tuple)
        source = [self._or_zeros(t) for t in first] if many else self._or_zeros(first)
        if plain in ("_to_copy", "clone"):
            return self.put(output, source.clone())
        if plain == "glu":
            one, other = source.chunk(2, args[1] if len(args) > 1 else kwargs.get("dim", -1))
            self.meet(one, other)
            return self.put(output, torch.maximum(one, other))
        if plain == "constant_pad_nd":
            return self.put(output, padded(source, args[1]))
        result = _as_values(func, plain, source, args[1:], kwargs)
        for tensor, labels in zip(tensors(output), tensors(result), strict=True):
            if plain != "index" or labels.any():
                self.put(tensor, labels)
        if not many:
            self._parts(plain, source, args, tensors(result))
        return None

    def _or_zeros(self, tensor: Tensor) -> Tensor:
        labels = self.of(tensor)
        return torch.zeros_like(tensor, dtype=torch.int32) if labels is None else labels

    def _parts(self, plain: str, source: Tensor, args: Any, parts: list[Tensor]) -> None:
        """Equal parts of an axis must stay equal."""
        if "split" in plain and len({p.shape for p in parts}) == 1:
            self._even(torch.stack(narrowed(parts)).flatten(1))
        elif plain == "slice":
            axis, start, _, step = [*args[1:], *(0, 0, None, 1)[len(args) - 1 :]]
            size, length = source.shape[axis], parts[0].shape[axis]
            start, axis = (start or 0) % size, axis % source.ndim
            if 1 < length < size and size % length == 0 and varies(source, axis):
                if step > 1 and size // length == step:
                    parts = [source.narrow(axis, i, size - i)[every(axis, step)] for i in range(step)]
                    self._even(torch.stack(narrowed(parts)).flatten(1))
                elif step == 1 and start % length == 0:
                    self._even(torch.stack(narrowed(source.split(length, axis))).flatten(1))
        elif "shuffle" in plain and "channel" in plain:
            self._even(torch.stack(narrowed(source.chunk(args[1], 1))).flatten(1))
        elif plain in ("view", "_unsafe_view", "reshape", "_reshape_alias"):
            (narrow,), (before,) = narrowed(parts), narrowed([source])
            axes = [a for a, n in enumerate(narrow.shape) if n > 1]
            if len(axes) > sum(n > 1 for n in before.shape):
                self._even(narrow.reshape(-1, narrow.shape[axes[-1]]))

    def _product(self, a: Tensor, b: Tensor, bias: Tensor | None, output: Tensor) -> None:
        """[…, i, k] times […, k, j]: channels along k meet, those along i and j go on."""
        one, other = self._or_zeros(a), self._or_zeros(b)
        of_rows, of_columns = one[..., :1], other[..., :1, :]
        inner = [varies(one, -1), varies(other, -2)]
        if all(inner):
            for labels, kept, axis in ((one, one.amax(-2, True), -2), (other, other.amax(-1, True), -1)):
                if varies(labels, axis):
                    self._same(kept.expand_as(labels)[labels != 0], labels[labels != 0])
            self.meet(one.amax(-2), other.amax(-1))
        elif any(inner):
            self.keep(one if inner[0] else other, "they are multiplied by a matrix that is no layer" + self.where())
        rows = torch.zeros_like(of_rows) if inner[0] else of_rows
        columns = torch.zeros_like(of_columns) if inner[1] else of_columns
        rows, columns = rows.expand(output.shape), columns.expand(output.shape)
        if ((rows != 0) & (columns != 0)).any():
            self.keep(rows, PADDED + self.where())
            self.keep(columns, PADDED + self.where())
        self.put(output, torch.maximum(rows, columns))
        if bias is not None:
            self._pointwise([output, bias], output, True)

    def _attention(self, args: Any, kwargs: Any, output: Tensor) -> None:
        for x in args[:2]:
            if (labels := self.of(x)) is not None and varies(labels, -1):
                self.keep(labels, "an attention is scaled by how many they are" + self.where())
        values = self._or_zeros(args[2])
        if varies(values, -2):
            return self.keep(values, "an attention reads them as positions" + self.where())
        return self.put(output, values[..., :1, :].expand(output.shape).clone())

    def _spatial(self, x: Tensor, output: Tensor) -> None:
        labels = self.of(x)
        if labels is None:
            return None
        axis = 0 if x.ndim < output.ndim or (varies(labels, 0) and not varies(labels, 1)) else 1
        if x.shape[axis] != output.shape[axis] or any(varies(labels, a) for a in range(x.ndim) if a != axis):
            return self.keep(labels, "they are pooled or resized" + self.where())
        (narrow,) = narrowed([labels])
        return self.put(output, narrow.expand(output.shape).clone())

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
        labels = self.of(x)
        if labels is None:
            return
        axes = sorted(a % x.ndim for a in axes)
        left = labels
        for axis in axes:
            left = left.amax(axis, keepdim=True)
        if any(varies(labels, a) for a in axes):
            if any(varies(labels, a) for a in range(x.ndim) if a not in axes):
                self._same(left.expand_as(labels)[labels != 0], labels[labels != 0])
            else:
                if what:
                    self.keep(labels, what + self.where())
                left = torch.zeros_like(left)
        if output.shape == x.shape:
            self.put(output, left.expand(output.shape).clone() if left.any() else None)
        elif left.any():
            self.put(output, left.reshape(output.shape).clone())

    def _pointwise(self, read: list[Tensor], output: Tensor, in_place: bool) -> None:
        labelled: Tensor | None = None
        fixed = []
        for tensor in read:
            labels = self.of(tensor)
            if labels is None or not labels.any():
                fixed.append(tensor)
                continue
            labels = labels.expand(output.shape)
            if labelled is None:
                labelled = labels
            elif labels is not labelled:
                self.meet(labelled, labels)
                labelled = torch.maximum(labelled, labels)
        if labelled is None:
            return
        for tensor in fixed:
            axes = range(-tensor.ndim, 0)
            if tensor.numel() > 1 and any(tensor.shape[a] > 1 and varies(labelled, a) for a in axes):
                self.keep(labelled, self._constant(tensor) + self.where())
        if in_place and id(output) in self.labels:
            self.labels[id(output)].copy_(labelled.clone())
        else:
            self.put(output, labelled.clone())

    def _constant(self, tensor: Tensor) -> str:
        if (name := self.bare.get(id(tensor))) is not None:
            return f'the bare parameter "{name}" has these channels, and not on its last axis'
        return "a value with a fixed size has these channels too"


def _has_channels(module: nn.Module) -> bool:
    return channels_of(module, "out") is not None


def _of_torch(filename: str) -> bool:
    return filename.startswith((str(Path(torch.__file__).parent), "<"))


def _as_values(func: Any, plain: str, source: Any, rest: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The operator on numbers in place of values. Not every kernel takes integers, nor every view their strides."""
    try:
        return func(source, *rest, **kwargs)
    except RuntimeError:
        if plain in ("view", "_unsafe_view"):
            return source.reshape(rest[0])
        return func(source.double(), *rest, **kwargs).to(torch.int32)
