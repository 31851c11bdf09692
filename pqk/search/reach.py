"""Whether a clause about time is out of reach: of any network, or of every student that is cut out of the teacher.

A network that computes nothing still is a call, and the smallest student that can be cut is as fast untrained as
trained: both are timed before anything is trained.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from pqk.core.distributed import alone
from pqk.core.onnxruntime_session import session
from pqk.errors import InputError, PqkError, Reason
from pqk.recipe.contract import Contract
from pqk.search.attempts import Attempts
from pqk.search.candidates import GOALS, Candidate, CutKind, prune
from pqk.search.ladder import CUTS

SLACK = 1.25
"""times faster that a student may be than what was timed: times are noisy, and no two cuts are the same"""


def write_nothing(teacher: Path, path: Path, feeds: dict[str, NDArray[Any]]) -> None:
    """Writes an ONNX file with the inputs of `teacher`, whose outputs are always those of `feeds`."""
    model = onnx.load(teacher, load_external_data=False)
    names = [output.name for output in model.graph.output]
    arrays = [np.asarray(value) for value in session(teacher).run(names, feeds)]
    values = [numpy_helper.from_array(array, f"{name}.value") for name, array in zip(names, arrays, strict=True)]
    outputs = [helper.make_tensor_value_info(n, v.data_type, list(v.dims)) for n, v in zip(names, values, strict=True)]
    nodes = [helper.make_node("Identity", [v.name], [n]) for n, v in zip(names, values, strict=True)]
    graph = helper.make_graph(nodes, "nothing", list(model.graph.input), outputs, values)
    onnx.save(helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version), path)


def refuse_out_of_reach(attempts: Attempts) -> None:
    """Raises `InputError` where the contract asks for less time than a network takes that computes nothing."""
    contract, judge = attempts.contract, attempts.judge
    if not contract.timed or not judge.timed:
        return

    def measure() -> dict[str, float]:
        began, path = time.perf_counter(), judge.folder / "nothing.onnx"
        try:
            with alone():
                write_nothing(judge.teacher_files[0], path, attempts.task.feeds(1))
                high = judge.speed_up(path).high
                least = judge.teacher_ms / high
        finally:
            path.unlink(missing_ok=True)
        return {"ratio": high, "milliseconds": least, "seconds": time.perf_counter() - began}

    least = attempts.context.decide("nothing", measure)
    attempts.spending.add("timing a network that computes nothing", least["seconds"], 0.0)
    if contract.in_time(SLACK * least["ratio"], least["milliseconds"] / SLACK):
        return
    raise InputError(
        f"contract: {_asked(contract)} is out of reach on this machine: a network with the teacher's inputs and "
        f"outputs that computes nothing takes {least['milliseconds']:.3g} ms for a call and is {least['ratio']:.3g} "
        "times as fast as the teacher; ask for less"
    )


def why_not_in_reach(attempts: Attempts, form: Candidate) -> Reason | None:
    """Why no student that is cut out of the teacher could be as fast as the contract asks; None: one may be.

    The smallest ones are cut, and timed untrained in integers as `form` is, until one is fast enough.
    """
    contract = attempts.contract
    known = [t.worth for t in attempts.tried if t.worth is not None and t.worth.ratio_high is not None]
    if not contract.timed or any(contract.in_time(w.ratio_high or 0.0, w.milliseconds_low) for w in known):
        return None
    found: list[tuple[float, str]] = []
    for cut in CUTS:
        candidate = _smallest(cut, form)
        if attempts.spending.why_not_begun(*attempts.spending.expected(candidate.passes)):
            return None
        entry = _timed(attempts, candidate)
        if entry["ratio"] is None:
            continue
        if contract.in_time(SLACK * entry["ratio"], entry["milliseconds"] / SLACK):
            return None
        said = f"{entry['ratio']:.3g}x at most, {entry['milliseconds']:.3g} ms at least"
        found.append((entry["ratio"], f"{candidate.name}: {said}"))
        fate = f"not trained, as it is {said}; the contract asks for {_asked(contract)}"
        attempts.untried(candidate, fate, entry["seconds"])
    if not found:
        return None
    return f"no student that is cut out of the teacher is that fast; the fastest is {max(found)[1]}"


def _smallest(cut: CutKind, form: Candidate) -> Candidate:
    goal = len(GOALS)
    passes = (prune(goal, cut), *form.passes)
    return Candidate(
        f"smallest by {cut}", f"cut by {cut} to {GOALS[-1]:g} times fewer MACs, or as far as that goes; {form.what}",
        passes, cut, goal,
    )  # fmt: skip


def _timed(attempts: Attempts, candidate: Candidate) -> dict[str, Any]:
    """How fast an untrained student is at most, journaled."""

    def measure() -> dict[str, Any]:
        began, high, least = time.perf_counter(), None, None
        try:
            with alone():
                program = attempts.runs.program(attempts.fitted(candidate).passes)
                high = attempts.judge.speed_up_of(program).high
                least = attempts.judge.teacher_ms / high
        except PqkError:  # a rung meets it again, and says it
            pass
        return {"ratio": high, "milliseconds": least, "seconds": time.perf_counter() - began}

    entry = attempts.context.decide(f"smallest/{candidate.cut}", measure)
    attempts.spending.add(f"timing {candidate.name}", entry["seconds"], attempts.spending.overhead)
    return dict(entry)


def _asked(contract: Contract) -> str:
    clauses = (("min_speedup", contract.min_speedup), ("max_latency_ms", contract.max_latency_ms))
    return " and ".join(f"{name} = {bound:g}" for name, bound in clauses if bound is not None)
