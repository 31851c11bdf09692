"""What is measured of a finished student: one object, so that a compile can be judged at length or in seconds."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from pqk.bench.measure import FEWEST_ROUNDS, QUICK, THREADS, TimingProtocol
from pqk.errors import InputError, nearest
from pqk.report.diagnostics import ControlVariant
from pqk.settings import settings

Baseline = Literal["onnxruntime", "optimum", "neural-compressor"]
"""tools that quantize the teacher after training"""
Runtime = Literal["torch", "torch.compile", "openvino"]
"""runtimes beside ONNX Runtime"""


@settings
class Evaluation:
    """What to measure of a finished student, beside what, and how long. The default is that of every committed result.

    Raises:
        InputError: a control, baseline or runtime is unknown, a batch or a number of threads is below 1, or one of
            texts is negative.
    """

    rehearsal: bool = True
    """whether the untrained student is deployed before anything is trained, so that what would be refused at the end
    is refused at once; it takes seconds"""
    controls: tuple[ControlVariant, ...] = ()
    """students that are trained once more without what the teacher knows, each as long as the student was"""
    baselines: tuple[Baseline, ...] = get_args(Baseline)
    """whose post-training quantization of the teacher has rows in the table, where it is installed"""
    runtimes: tuple[Runtime, ...] = get_args(Runtime)
    """where teacher and student are timed beside ONNX Runtime, where it is installed"""
    steps_between: bool = True
    """whether the float students after pruning and after distillation have rows"""
    latency: bool = True
    """whether anything is timed"""
    layer_times: bool = True
    """whether it is measured in which layers the time goes, where anything is timed; it takes seconds"""
    timing: TimingProtocol = Field(default_factory=TimingProtocol)
    """how long contenders are measured in turn"""
    threads: int = THREADS
    """intra-op threads of every runtime"""
    texts: int = 32
    """prompts of evaluation data that teacher and student continue, where they continue texts"""
    batches: tuple[int, ...] = (1, 32)
    """batch sizes that the table's networks are timed at; the first is the one that the table shows"""

    def __post_init__(self) -> None:
        if self.latency and self.timing.rounds < FEWEST_ROUNDS:
            raise InputError(
                f"evaluation: timing has {self.timing.rounds} rounds; an interval needs at least {FEWEST_ROUNDS}, or "
                "say latency=False"
            )
        if self.texts < 0:
            raise InputError(f"evaluation: texts={self.texts} must be 0 or more")
        if self.threads < 1 or not self.batches or min(self.batches) < 1:
            raise InputError(f"evaluation: threads={self.threads} and batches={self.batches} must be 1 or more")

    @staticmethod
    def full() -> Evaluation:
        """With all controls, which are trained as long as the student was, each."""
        return Evaluation(controls=get_args(ControlVariant))

    @staticmethod
    def quick() -> Evaluation:
        """Accuracy, parity, coverage and size of teacher and student, and times that mean little: in seconds."""
        return Evaluation(
            baselines=(), runtimes=(), steps_between=False, layer_times=False, timing=QUICK, texts=4, batches=(1,)
        )

    @staticmethod
    def named(name: str) -> Evaluation:
        """`standard` (the default), `full` or `quick`.

        Raises:
            InputError: it is unknown; the message names the nearest one.
        """
        forms = {"standard": Evaluation, "full": Evaluation.full, "quick": Evaluation.quick}
        if not isinstance(name, str) or name not in forms:
            raise InputError(f'evaluation: "{name}"{nearest(name, forms)}')
        return forms[name]()
