"""What the teacher is worth after post-training quantization alone: the tools that need no training, at their best.

ONNX Runtime's own static quantization is always there, and for transformers its dynamic one, which with products in
blocks (`MatMulNBits`) is what it has for models that continue texts, beside optimum's
`ORTQuantizer`, which runs the same quantizers with other settings: those it recommends for the kind of CPU. The FP32
baseline of a transformer gets ONNX Runtime's own tool for them, `onnxruntime.transformers.optimizer`, where that makes
it faster. Intel's neural-compressor is used where it is installed. Its ONNX side was last released in 2024 as
onnx-neural-compressor 1.0, which pins numpy below 2, so what is measured is what neural-compressor 3 offers on a CPU:
static INT8 through PyTorch's exported graphs, run by `torch.compile`.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx
import torch
from torch import fx, nn

from pqk.bench.contenders import Feeds
from pqk.bench.measure import THREADS, ratio_to
from pqk.core.onnxruntime_session import encoder_of, files_of, session
from pqk.data.structures import Inputs
from pqk.deploy.onnx_emitter import emit_onnx_for
from pqk.errors import InputError, Reason, first_line
from pqk.quiet import quiet
from pqk.target.machine import installed
from pqk.target.target import Target, machine_target
from pqk.task.axes import Axes, free_axes
from pqk.task.task import Task

CALIBRATION = 512
"""samples of the validation data: the ranges that min-max finds hardly move after a few hundred"""
PADDED = 32
"""samples of a batch in which some are padded"""
SAME = 1e-3
"""largest difference of outputs, over the largest of them, that a rearranged float graph may make"""


def onnxruntime_ptq(teacher: Path, out: Path, calibration: Iterable[Inputs], target: Target) -> None:
    """Write the INT8 form of an FP32 ONNX file: QDQ, min-max calibration, weights per channel.

    Activations are uint8 and weights int8 (both int8 on Arm). Where the target is `x86-avx2` and this machine has no
    VNNI, weights get 7 bits (`reduce_range`), as ONNX Runtime's documentation asks: with 8, `vpmaddubsw` saturates and
    the baseline would lose accuracy for a reason that is not quantization. `calibration` yields tuples in the order
    of the file's inputs. Raises `InputError` for no calibration data or a file it cannot quantize.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    names = [i.name for i in session(teacher).get_inputs()]
    batches = [{n: t.numpy() for n, t in zip(names, inputs, strict=True)} for inputs in calibration]
    if not batches:
        raise InputError("post-training quantization of the teacher: no calibration samples")

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder, quiet(level=logging.ERROR):
        prepared = Path(folder) / "prepared.onnx"
        try:
            quant_pre_process(teacher, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                out,
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8 if target.activation.dtype == "uint8" else QuantType.QInt8,
                weight_type=QuantType.QInt8,
                reduce_range=_seven_bits(target),
            )
        except Exception as error:  # the quantizer's errors share no base class
            raise InputError(f"ONNX Runtime cannot quantize the teacher: {first_line(error)}") from error


def _seven_bits(target: Target) -> bool:
    return target.name == "x86-avx2" and machine_target() == "x86-avx2"


def onnxruntime_dynamic(teacher: Path, out: Path, target: Target) -> str | None:
    """Write the INT8 form of an FP32 ONNX file whose activations are quantized at run time: None, or why it has none.

    Matrix products and tables of embeddings, weights int8 per channel, of 7 bits as in `onnxruntime_ptq`.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet(level=logging.ERROR):
        try:
            quantize_dynamic(
                teacher,
                out,
                op_types_to_quantize=["MatMul", "Gather", "EmbedLayerNormalization", *_own_attention(teacher)],
                per_channel=True,
                reduce_range=_seven_bits(target),
                weight_type=QuantType.QInt8,
            )
        except Exception as error:  # the quantizer's errors share no base class
            return f"ONNX Runtime cannot quantize the teacher dynamically: {first_line(error)}"
    return None


def _own_attention(path: Path) -> list[str]:
    """ONNX Runtime's own `Attention`, where a file has it: the quantizer takes ONNX's operator of that name for it, and
    writes a file that does not load (`findings/ort_quantizer_standard_attention.sh`)."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    return ["Attention"] if any(n.op_type == "Attention" and n.domain for n in nodes) else []


def why_not_written_in_blocks(teacher: Path, out: Path) -> Reason | None:
    """Write the form of an FP32 ONNX file whose products are `MatMulNBits`: None, or why it has none.

    Weights of 8 bits in blocks of 32, symmetric, `accuracy_level` 4: the tool's own level multiplies in float, which
    takes many times as long (`findings/ort_nbits_default_accuracy.sh`).
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with quiet(level=logging.ERROR), tempfile.TemporaryDirectory() as folder:
        try:
            plain = Path(folder) / "plain.onnx"
            quant_pre_process(teacher, plain, skip_symbolic_shape=True)  # a tied head becomes a weight of its own
            settings = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, accuracy_level=4, bits=8)
            quantizer = MatMulNBitsQuantizer(onnx.load(plain), algo_config=settings)
            quantizer.process()
            quantizer.model.save_model_to_file(str(out), False)
        except Exception as error:  # as above
            return f"ONNX Runtime cannot write the teacher's products in blocks: {first_line(error)}"
    return None


def optimum_ptq(teacher: Path, out: Path, calibration: Iterable[Inputs] | None, target: Target) -> str | None:
    """Write the INT8 form of an FP32 ONNX file by optimum's `ORTQuantizer`: None, or why there is none.

    The settings are those that optimum recommends for the target's kind of CPU, with 7 bits as in `onnxruntime_ptq`.
    `calibration` yields tuples in the order of the file's inputs, for static quantization by min-max; None: dynamic.
    """
    if installed("optimum-onnx") is None:
        return "optimum is not installed: pip install 'pqk[encoders]'"
    static = calibration is not None
    with quiet(level=logging.ERROR), tempfile.TemporaryDirectory() as folder:
        try:
            from onnxruntime.quantization import CalibrationMethod
            from optimum.onnxruntime import AutoQuantizationConfig, ORTQuantizer
            from optimum.onnxruntime.configuration import CalibrationConfig
            from transformers import PretrainedConfig

            names = [i.name for i in session(teacher).get_inputs()]
            samples = [
                {n: row.tolist() for n, row in zip(names, rows, strict=True)}
                for inputs in calibration or ()
                for rows in zip(*inputs, strict=True)
            ]
            kinds = {"x86-avx2": AutoQuantizationConfig.avx2, "x86-vnni": AutoQuantizationConfig.avx512_vnni}
            settings = kinds.get(target.name, AutoQuantizationConfig.arm64)(is_static=static, per_channel=True)
            settings.reduce_range = _seven_bits(target)
            quantizer, ranges = ORTQuantizer(teacher, PretrainedConfig()), None
            if static:
                ranges = quantizer.fit(
                    samples,
                    CalibrationConfig("validation", "", "", len(samples), CalibrationMethod.MinMax),
                    onnx_augmented_model_name=str(Path(folder) / "augmented.onnx"),
                    operators_to_quantize=settings.operators_to_quantize,
                )
            quantizer.quantize(settings, folder, calibration_tensors_range=ranges)
            (Path(folder) / f"{teacher.stem}_quantized.onnx").replace(out)
        except Exception as error:  # what it raises shares no base class
            return f"optimum {installed('optimum-onnx')}: {first_line(error)}"
    return None


def is_transformer(path: Path) -> bool:
    """Whether an ONNX file computes attention: products around a softmax, and layer norms."""
    graph = onnx.load(path, load_external_data=False).graph
    return {"MatMul", "Softmax", "LayerNormalization"} <= {n.op_type for n in graph.node}


def optimized_transformer(teacher: Path, out: Path, padded: Feeds, feeds: Feeds, threads: int) -> tuple[bool, str]:
    """What `onnxruntime.transformers.optimizer` makes of the ONNX file of a transformer, on top of what a session does.

    Outputs are compared on `padded`, inputs whose masks say something, and times taken on `feeds`.
    Returns whether `out` is the better baseline, and in words for the report what was done or why not: the tool may
    fuse nothing, change the outputs, or make the session significantly slower.
    """
    tool = "onnxruntime.transformers.optimizer (bert)"
    with quiet():  # it warns, among others, of a folder that the tool leaves to the garbage collector
        try:
            with quiet(level=logging.ERROR, printing=True):
                from onnxruntime.transformers.optimizer import optimize_model

                model = optimize_model(str(teacher), model_type="bert", opt_level=1, use_gpu=False)
                fused = {name: n for name, n in model.get_fused_operator_statistics().items() if n}
                model.save_model_to_file(str(out))
            runs = [session(path, threads=threads) for path in (teacher, out)]
            plain, other = (run.run(None, dict(padded)) for run in runs)
        except Exception as error:  # the tool is a script: it raises what it meets
            return False, f"teacher FP32 is without {tool}: {first_line(error)}"
    if not fused:
        return False, f"teacher FP32 is without {tool}, which fuses nothing in it"
    worst = max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-6)) for a, b in zip(plain, other, strict=True))
    if worst > SAME:
        return False, f"teacher FP32 is without {tool}, which moves its outputs by {worst:.1g} of the largest"
    gain = ratio_to(runs[0], runs[1], feeds)
    said = ", ".join(f"{n} {name}" for name, n in fused.items())
    said += f"; {gain.ratio:.2f}x ({gain.low:.2f} to {gain.high:.2f}) as fast as with the session's optimizations alone"
    if gain.high < 1:
        return False, f"teacher FP32 is without {tool}, which makes it slower: {said}"
    return True, f"teacher FP32 is optimized by {tool}: {said}"


def float_baseline(teacher: Path, out: Path, task: Task, threads: int) -> tuple[bool, str]:
    """Whether `out` is written, the transformer of an ONNX file as ONNX Runtime's tool optimizes it, and a faster one.

    The second value says in words for the report what was done, or why not. A file that is no better is removed: where
    it stands, `pqk benchmark` takes it for the baseline.
    """
    batch = next(task.calibration(PADDED, teacher=True))
    padded = {name: t.numpy() for name, t in zip(task.input_names, batch, strict=True)}
    better, note = optimized_transformer(teacher, out, padded, task.feeds(1), threads)
    if not better:
        out.unlink(missing_ok=True)
    return better, note


def float_files(teacher: nn.Module, task: Task, folder: Path) -> tuple[Path, Path]:
    """Write a teacher in FP32 into `folder`: as exported, and what students are held against, which may be the same.

    The second one of a transformer is as ONNX Runtime's tool has it, if that is faster.
    """
    exported, optimized = folder / "teacher.onnx", folder / "teacher_optimized.onnx"
    emit_onnx_for(teacher, task, exported)
    better = is_transformer(exported) and float_baseline(exported, optimized, task, THREADS)[0]
    return exported, optimized if better else exported


def ptq(teacher: Path, out: Path, task: Task, target: Target, samples: int = CALIBRATION) -> str | None:
    """`onnxruntime_ptq` on (at most `samples`) validation samples: None, or why there is no such file."""
    try:
        onnxruntime_ptq(teacher, out, task.calibration(samples, teacher=True), target)
    except InputError as error:
        return str(error)
    return None


def neural_compressor_ptq(
    teacher: nn.Module, example: Inputs, calibration: Iterable[Inputs], axes: Axes | None = None
) -> tuple[fx.GraphModule | None, str | None]:
    """The teacher quantized by neural-compressor with its default static INT8 configuration, or None and the reason.

    `example` is a batch of at least 2 inputs, so that the batch axis is seen; `axes` names further free axes. The
    result is a float graph with quantize / dequantize operators: measure it with
    `compiled_contender(…, runtime="neural-compressor")`.
    """
    if installed("neural-compressor") is None:
        return None, "neural-compressor is not installed: pip install 'pqk[ptq]'"
    with quiet(level=logging.ERROR):  # torchao and the exporter deprecate a good part of themselves
        try:
            from neural_compressor.torch.export import export
            from neural_compressor.torch.quantization import StaticQuantConfig, convert, prepare

            with torch.no_grad():
                exported = export(teacher, example, dynamic_shapes=free_axes(teacher, example, axes))
                if exported is None:
                    return None, "neural-compressor could not export the teacher (torch.export failed)"
                prepared = prepare(exported, StaticQuantConfig(), example_inputs=example)
                for inputs in calibration:
                    prepared(*inputs)
                return convert(prepared), None
        except Exception as error:  # a missing torchao, an operator it does not know: the row is left out, with this
            return None, f"neural-compressor {installed('neural-compressor')}: {first_line(error)}"


Tool = Literal["teacher_ptq", "teacher_dynamic", "teacher_blocks", "teacher_optimum_static", "teacher_optimum_dynamic"]
"""what another tool makes of the teacher's file without training, as the report's rows are called"""
TOOLS: tuple[Tool, ...] = get_args(Tool)
FOR_TEXTS: tuple[Tool, ...] = ("teacher_dynamic", "teacher_blocks")
"""those for files that continue texts, which no reader of calibration data feeds"""


def why_not_quantized(tool: Tool, teacher: Path, out: Path, task: Task, target: Target) -> Reason | None:
    """Write what a tool makes of the FP32 ONNX file of the teacher: None, or why there is no such file.

    Of a decoder with an encoder, whose file lies beside, both are written.
    """
    if task.seq2seq and tool in ("teacher_ptq", "teacher_optimum_static"):
        return "its calibration runs one file on what is given to both, the encoder's and the decoder's"
    pairs = zip(files_of(teacher), (out, encoder_of(out)), strict=False)
    reasons = (_why_not_one(tool, source, made, task, target) for source, made in pairs)
    return next((reason for reason in reasons if reason is not None), None)


def _why_not_one(tool: Tool, teacher: Path, out: Path, task: Task, target: Target) -> Reason | None:
    if tool == "teacher_ptq":
        return ptq(teacher, out, task, target)
    if tool == "teacher_dynamic":
        return onnxruntime_dynamic(teacher, out, target)
    if tool == "teacher_blocks":
        return why_not_written_in_blocks(teacher, out)
    samples = task.calibration(CALIBRATION, teacher=True) if tool == "teacher_optimum_static" else None
    return optimum_ptq(teacher, out, samples, target)
