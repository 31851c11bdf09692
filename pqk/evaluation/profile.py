"""In which layers the time of teacher and student goes, in float and in integers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pqk.bench.layer_times import conditions, layer_times
from pqk.evaluation.attempts import Failure, attempt
from pqk.evaluation.rows import OnnxFile, Subject, Variant
from pqk.report.layer_times import LayerTimes, NetworkTimes
from pqk.report.schema import VariantName

FLOAT_STUDENTS: tuple[VariantName, ...] = ("pruned_distilled", "pruned")
"""the student before it is quantized, whichever is there first"""


def profile(variants: Sequence[Variant], subject: Subject) -> LayerTimes | None:
    """The layers of four networks, those that are there; None where nothing is timed, or this was not asked for."""
    settings = subject.settings
    if subject.why_not_timed is not None or not settings.layer_times:
        return None
    batch, networks, reasons = settings.batches[0], list[NetworkTimes](), dict[str, str]()
    feeds = subject.task.feeds(batch)
    for file in _profiled([v for v in variants if isinstance(v, OnnxFile)]):
        found = attempt(lambda f=file: layer_times(f.path, feeds, f.name, threads=settings.threads))  # type: ignore[misc]
        if isinstance(found, Failure):
            reasons[file.name] = found.reason
        else:
            networks.append(found)
    return LayerTimes(
        batch=batch, threads=settings.threads, networks=tuple(networks), reasons=reasons, conditions=conditions()
    )


def _profiled(files: Sequence[OnnxFile]) -> Iterator[OnnxFile]:
    """Teacher and student, each in float and in integers."""
    by_name = {file.name: file for file in files}
    student = next((name for name in FLOAT_STUDENTS if name in by_name), None)
    for name in ("teacher_fp32", "teacher_ptq", student, "student"):
        if name in by_name:
            yield by_name[name]
