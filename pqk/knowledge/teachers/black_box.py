"""Teachers that only answer: a function, or an ONNX file. Terms that need their features are refused."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk.core.onnxruntime_session import of_every_token, session
from pqk.data.data import Batch
from pqk.data.structures import Inputs, Outputs, map_tensors, tensors, widened
from pqk.documents import opened
from pqk.errors import InputError, Reason
from pqk.knowledge.teachers.base import Teacher, TeacherAnswer


class CallableTeacher(Teacher):
    """Any function of the inputs: a service, another framework, a rule.

    Args:
        function: inputs (tensors [B, …]) -> logits [B, …, C], or a tuple or dict of them; `logits_of_labels` and
            `logits_of_top_k` make logits of what such a box often gives instead.
        identity: any text that names what answers, which lets its answers be kept; None: they are not.

    Raises:
        InputError: the function is a torch module, which would be trained along.
    """

    no_feature_reason = (
        "the teacher is a black box, which shows nothing but its outputs; choose terms that compare those"
    )

    def __init__(self, function: Callable[..., Outputs], identity: str | None = None) -> None:
        super().__init__()
        if isinstance(function, nn.Module):
            raise InputError("distill: a torch module is no black box; let a FrozenTeacher answer for it")
        self.function, self.name = function, identity

    def why_not_cached(self) -> Reason | None:
        return "a function does not say what it computes; give the teacher an `identity`" if self.name is None else None

    def identity(self) -> str:
        return f"callable {self.name}"

    def check(self, example: Inputs) -> None:
        answers = tensors(self.live(Batch(example, None, None))[0])
        shapes = [tuple(t.shape) for t in answers]
        if not shapes or any(not s or s[0] != len(example[0]) for s in shapes):
            raise InputError(
                f"distill: the teacher answers {len(example[0])} samples with tensors of shapes {shapes}; each must "
                f"have one row for every sample"
            )

    def live(self, batch: Batch) -> TeacherAnswer:
        outputs = self.function(*batch.for_teacher().inputs)
        if not tensors(outputs):
            raise InputError(f"distill: the teacher's answer is a {type(outputs).__name__} without tensors")
        device = batch.inputs[0].device
        return map_tensors(lambda t: (widened(t) if t.is_floating_point() else t).detach().to(device), outputs), {}


class OnnxTeacher(CallableTeacher):
    """A float ONNX file, run by ONNX Runtime on the CPU with as many threads as torch has.

    Args:
        path: the file.
        example: inputs like those that it will answer, each [B, …], in the model's order.

    Raises:
        InputError: the file cannot be run, takes other inputs than the example's, or takes one size of batch only.
    """

    def __init__(self, path: str | Path, example: Inputs) -> None:
        self.path = Path(path)
        try:
            # Without spinning: torch needs the cores in between.
            onnx_session = of_every_token(session(self.path, threads=torch.get_num_threads(), spinning=False))
        except InputError as error:
            raise InputError(f"distill: the teacher cannot be run: {error}") from error
        _check_inputs(self.path, onnx_session, example)
        names = [i.name for i in onnx_session.get_inputs()]

        def answer(*inputs: Tensor) -> Outputs:
            feeds = {n: np.ascontiguousarray(t.detach().cpu().numpy()) for n, t in zip(names, inputs, strict=True)}
            try:
                outputs = [torch.from_numpy(a) for a in onnx_session.run(None, feeds)]
            except Exception as error:  # onnxruntime's exceptions share no public base class
                shapes = [tuple(t.shape) for t in inputs]
                raise InputError(f"distill: the teacher {path} cannot take inputs {shapes}: {error}") from error
            return outputs[0] if len(outputs) == 1 else tuple(outputs)

        super().__init__(answer)

    def why_not_cached(self) -> Reason | None:
        return None

    def identity(self) -> str:
        """Identifies the file by a hash of its bytes and of those of the files that hold its larger tensors.

        Raises:
            InputError: one of these cannot be read, or is not beside it.
        """
        model = onnx.load(str(self.path), load_external_data=False)
        stored = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
        outside = next((name for name in stored if Path(name).is_absolute() or ".." in Path(name).parts), None)
        if outside is not None:
            raise InputError(f"distill: the teacher {self.path} keeps tensors in {outside}, which is not beside it")
        digest = hashlib.sha256()
        for path in (self.path, *(self.path.parent / name for name in sorted(stored))):
            with opened(path) as (file, _):
                while block := file.read(1 << 24):
                    digest.update(block)
        return f"onnx {digest.hexdigest()}"


def _check_inputs(path: Path, onnx_session: ort.InferenceSession, example: Inputs) -> None:
    """Raises `InputError` where the file's inputs are not the example's, or it takes one size of batch only."""
    own = [(i.name, i.shape, i.type) for i in onnx_session.get_inputs()]
    tasks = [(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in example]
    types = {"float": "float32", "double": "float64"}

    def fits(shape: Sequence[int | str | None], kind: str, t: Tensor) -> bool:
        kind = kind.removeprefix("tensor(").removesuffix(")")
        axes = zip(shape[1:], t.shape[1:], strict=False)
        same = len(shape) == t.dim() and all(not isinstance(n, int) or n == m for n, m in axes)
        return same and types.get(kind, kind) == str(t.dtype).removeprefix("torch.")

    if len(own) != len(example) or not all(fits(s, k, t) for (_, s, k), t in zip(own, example, strict=True)):
        raise InputError(f"distill: the teacher {path} takes {own}, and the task gives {tasks}")
    fixed = [(name, shape) for name, shape, _ in own if shape and isinstance(shape[0], int)]
    if fixed:
        name, shape = fixed[0]
        raise InputError(
            f"distill: the teacher {path} takes batches of {shape[0]} only (input {name}: {shape}), and those of the "
            "task vary; export it with a dynamic batch axis"
        )


def logits_of_labels(labels: Tensor, classes: int, smoothing: float = 0.1) -> Tensor:
    """Makes logits for a black box that only decides.

    Args:
        labels: int64 [B], or [B, n] of n decisions for each sample, of which the shares count.
        classes: how many there are.
        smoothing: share of the probability that goes to all classes alike, between 0 and 1.

    Returns:
        Logits float32 [B, classes], whose softmax are the smoothed shares.

    Raises:
        InputError: labels are not whole numbers from 0 to `classes` - 1, or `smoothing` is not between 0 and 1.
    """
    if labels.is_floating_point() or (labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes):
        raise InputError(f"distill: the teacher's labels must be whole numbers from 0 to {classes - 1}")
    if not 0 < smoothing < 1:
        raise InputError(f"distill: smoothing={smoothing} must be between 0 and 1: a logit of 0 is minus infinity")
    shares = F.one_hot(labels.reshape(len(labels), -1).long(), classes).float().mean(1)
    return ((1 - smoothing) * shares + smoothing / classes).log()


def logits_of_top_k(probabilities: Tensor, indices: Tensor, classes: int) -> Tensor:
    """Makes logits for a black box that gives its k most probable classes; the others share the rest alike.

    Args:
        probabilities: float [B, k].
        indices: their classes, int64 [B, k].
        classes: how many there are, more than k.

    Returns:
        Logits [B, classes] in the dtype of `probabilities`.

    Raises:
        InputError: the two shapes differ, or k is not less than `classes`.
    """
    k = probabilities.shape[-1]
    if probabilities.shape != indices.shape or k >= classes:
        raise InputError(
            f"distill: top-k answers are probabilities {tuple(probabilities.shape)} and classes "
            f"{tuple(indices.shape)}; both must be [B, k] with k below {classes}"
        )
    rest = (1 - probabilities.double().sum(-1, keepdim=True)).clamp_min(1e-6) / (classes - k)
    spread = rest.expand(len(rest), classes).scatter(-1, indices, probabilities.double().clamp_min(1e-12))
    return spread.log().to(probabilities.dtype)
