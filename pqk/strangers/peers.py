"""The same strangers through other tools, at their documented defaults and in the same time.

Each ends in a file for ONNX Runtime that is judged as pqk's students are. What a tool says where it does not take a
stranger is the reason of its cell.
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import onnx
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pqk.bench.baselines import CALIBRATION, onnxruntime_ptq
from pqk.copies import copy_of
from pqk.deploy.onnx_emitter import emit_onnx_for
from pqk.errors import InputError, PqkError, Reason, first_line
from pqk.models.strangers.stranger import Samples, Stranger
from pqk.quiet import quiet
from pqk.strangers.contest import Contest, Standing
from pqk.target.machine import installed
from pqk.target.target import Target
from pqk.task.axes import BATCH
from pqk.task.task import Task

SHARE = 0.5
"""of the teacher's MACs, that Torch-Pruning leaves"""
STEPS = 400
"""in which it prunes at most, as in its own benchmarks"""
UNLABELLED = "it is fine-tuned on labels, and the training data has none"


@dataclass(frozen=True)
class Case:
    """One stranger, as a peer gets it."""

    stranger: Stranger
    samples: Samples
    teacher: nn.Module
    """which a peer copies"""
    contest: Contest
    seconds: float
    """that it may train for"""

    @property
    def task(self) -> Task:
        """Its example and calibration data."""
        return self.contest.task


class Peer(ABC):
    """A tool beside pqk."""

    name: ClassVar[str]
    package: ClassVar[str]
    """as it is installed: `pip install`"""

    def why_not_here(self) -> Reason | None:
        """Why it cannot be run, else None."""
        if installed(self.package) is None:
            return f"{self.package} is not installed"
        return None

    @abstractmethod
    def write(self, case: Case, path: Path) -> None:
        """Writes an ONNX file of the compressed stranger; raises whatever the tool does where it cannot."""

    def standing(self, case: Case) -> Standing:
        """What the tool makes of a stranger, or in which words it does not."""

        def make(path: Path) -> None:
            try:
                with quiet(level=logging.ERROR, printing=True):
                    self.write(case, path)
            except PqkError:
                raise
            except Exception as error:  # of a tool, whose errors share no base class
                raise InputError(first_line(error)) from error

        return case.contest.made(self.name, make)


def fine_tune(model: nn.Module, case: Case) -> nn.Module:
    """An ordinary training loop for the time of a case: AdamW at the teacher's peak rate, on a cosine over the time."""
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(*case.samples.train), case.stranger.batch_size, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), case.stranger.rate, weight_decay=0.02)
    began = time.perf_counter()
    model.train()
    while True:
        for inputs, labels in loader:
            part = (time.perf_counter() - began) / case.seconds
            if part >= 1:
                return model.eval()
            for group in optimizer.param_groups:
                group["lr"] = case.stranger.rate * 0.5 * (1 + math.cos(math.pi * part))
            loss = F.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


class TorchPruning(Peer):
    """Torch-Pruning to half of the MACs by the magnitude of groups, fine-tuned, and ONNX Runtime's static quantization.

    As its README has it: `MagnitudePruner` with `GroupMagnitudeImportance`, the last layer ignored; in steps, until the
    MACs are a half, as its own benchmarks do.
    """

    name = "Torch-Pruning + ONNX Runtime"
    package = "torch-pruning"

    def write(self, case: Case, path: Path) -> None:
        import torch_pruning

        if not case.stranger.labelled:
            raise InputError(UNLABELLED)
        model, example = copy_of(case.teacher, "teacher").requires_grad_(True).eval(), case.task.example
        before, _ = torch_pruning.utils.count_ops_and_params(model, example[0])
        last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        pruner = torch_pruning.pruner.MagnitudePruner(
            model, example, torch_pruning.importance.GroupMagnitudeImportance(), pruning_ratio=1.0,
            iterative_steps=STEPS, ignored_layers=[last],
        )  # fmt: skip
        macs = before
        for _ in range(STEPS):
            pruner.step()
            macs, _ = torch_pruning.utils.count_ops_and_params(model, example[0])
            if macs <= SHARE * before:
                break
        else:
            raise InputError(f"it leaves {macs / before:.0%} of the MACs and prunes no more")
        fine_tune(model, case)
        pruned = path.with_name("pruned.onnx")
        emit_onnx_for(model, case.task, pruned)
        onnxruntime_ptq(pruned, path, case.task.calibration(CALIBRATION), Target.detect())
        pruned.unlink()


class NncfPostTraining(Peer):
    """`nncf.quantize` of the teacher's ONNX file, which needs no training."""

    name = "NNCF, post-training"
    package = "nncf"

    def write(self, case: Case, path: Path) -> None:
        import nncf

        names = case.task.input_names
        samples = [
            {name: t.numpy() for name, t in zip(names, inputs, strict=True)}
            for inputs in case.task.calibration(CALIBRATION)
        ]
        model = nncf.quantize(onnx.load(case.contest.exported), nncf.Dataset(samples), **_model_type(case.teacher))
        onnx.save(model, path)


class NncfTrained(Peer):
    """`nncf.quantize` of the PyTorch teacher, fine-tuned under quantization, and exported as its own layers.

    What it strips for export has quantizers of torch, which only the exporter of TorchScript knows.
    """

    name = "NNCF, fine-tuned"
    package = "nncf"

    def write(self, case: Case, path: Path) -> None:
        import nncf

        if not case.stranger.labelled:
            raise InputError(UNLABELLED)
        model = copy_of(case.teacher, "teacher").requires_grad_(True).eval()
        samples = [inputs[0] for inputs in case.task.calibration(CALIBRATION)]
        quantized = nncf.quantize(model, nncf.Dataset(samples), **_model_type(model))
        fine_tune(quantized, case)
        example = case.task.example
        native = nncf.strip(quantized, strip_format=nncf.StripFormat.NATIVE, example_input=example[0])
        names, outputs = list(case.task.input_names), list(case.task.output_names or ("logits",))
        axes = {name: {0: BATCH} for name in (*names, *outputs)}
        torch.onnx.export(
            native, example, str(path), input_names=names, output_names=outputs, dynamic_axes=axes, dynamo=False
        )


def _model_type(model: nn.Module) -> dict[str, Any]:
    """What NNCF's documentation asks to say of transformers."""
    import nncf

    attention = any(isinstance(m, nn.LayerNorm) for m in model.modules())
    return {"model_type": nncf.ModelType.TRANSFORMER} if attention else {}


PEERS: tuple[Peer, ...] = (TorchPruning(), NncfPostTraining(), NncfTrained())
