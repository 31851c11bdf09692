"""Times an artifact's student beside its teacher, on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pqk.bench.contenders import Contender, onnxruntime_contender
from pqk.bench.measure import TimingProtocol, measure
from pqk.core.run_folder import RunFolder
from pqk.deploy.artifact import Artifact, deployed_file
from pqk.documents import digest_of_file
from pqk.errors import InputError
from pqk.report.schema import LatencyRow


def benchmark(
    artifact: Artifact, batches: Sequence[int] = (1,), threads: int = 2, timing: TimingProtocol | None = None
) -> list[LatencyRow]:
    """The student beside its teacher, in turn, in ONNX Runtime on this machine; nothing is written.

    The teacher's FP32 file is not part of an artifact: ratios need `teacher.onnx` beside `model.onnx`, as in a
    finished compile's run state; without it ratios are null.

    Args:
        artifact: a finished compile that has a `model.onnx`.
        batches: the batch sizes to time, each with a baseline of its own.
        threads: intra-op threads of every session.
        timing: how long; 30 rounds of the default protocol where None.

    Returns:
        One row a contender and batch, in milliseconds.

    Raises:
        InputError: the artifact has no `model.onnx`, or the teacher's file beside it is another's.
    """
    if not (file := deployed_file(artifact.folder)).exists():
        raise InputError(f"{artifact.folder} has no model.onnx, which a CPU is timed with; use --device cuda on a GPU")
    timing = timing or TimingProtocol(rounds=30)
    teacher = next((p for p in RunFolder.of(artifact.folder).teacher_files if p.exists()), None)
    if teacher is not None:
        _check_teacher(teacher, artifact)
    rows: list[LatencyRow] = []
    for batch in batches:
        feeds = artifact.example(batch)
        student = onnxruntime_contender("student", file, feeds, threads=threads)
        base = onnxruntime_contender("teacher_fp32", teacher, feeds, threads=threads) if teacher else None
        contenders: list[Contender] = [student] if base is None else [base, student]
        timed = measure(contenders, base, timing)
        rows += timed if base is not None else [row.without_ratio() for row in timed]
    return rows


def _check_teacher(file: Path, artifact: Artifact) -> None:
    """Raises `InputError` where this is not the file that the compile left; artifacts of before do not say."""
    stated = artifact.manifest.get("teacher_files", {}).get(file.name)
    if stated is not None and digest_of_file(file) != stated:
        raise InputError(
            f"{file} is not the teacher of this compile: its sha256 is not the manifest's; without the file, the "
            "student is timed alone"
        )
