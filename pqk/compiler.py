"""`compress`: teacher, task, recipe and target in; an artifact out. Everything else is called from here."""

from __future__ import annotations

import copy
import dataclasses
import errno
import importlib.metadata
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from pqk.bench.oracle import Oracle
from pqk.core.distributed import from_main, is_main_process
from pqk.core.journal import Journal
from pqk.core.pipeline import check_order, run_passes, state
from pqk.core.program import Pass, Program, Stage
from pqk.core.progress import Observer, Silent
from pqk.core.run_context import RunContext
from pqk.data.data import digest_of
from pqk.data.structures import tensors
from pqk.deploy.artifact import DEPLOYED, Artifact, write_manifest
from pqk.deploy.onnx_emitter import emit_onnx, names_of_outputs
from pqk.deploy.torch_emitter import emit_torch
from pqk.deploy.tuning import NAME as TUNING
from pqk.errors import InputError, ParityError, nearest
from pqk.evaluation.evaluate import evaluate
from pqk.files import read_json, write_json, write_tensors, write_whole
from pqk.gpu.autotune import choose_tuning, gpu_for, read_tuning
from pqk.knowledge.teachers.base import weights_fingerprint
from pqk.recipe.fit import fit_recipe
from pqk.recipe.recipe import Recipe, TargetSpec, why_not_for_target
from pqk.report.markdown import to_markdown
from pqk.target.machine import machine_fingerprint
from pqk.target.target import Target
from pqk.task.task import Task
from pqk.training.trainer import Training, accelerator

OWN = ("student.safetensors", "student.json", "recipe.toml", "report.json", "report.md", TUNING, *DEPLOYED)
Attribution = Literal["standard", "full"]


def compress(
    teacher: nn.Module,
    task: Task,
    recipe: Recipe | str | Path | None = None,
    target: Target | str | None = None,
    out: str | Path = "out",
    *,
    seed: int | None = None,
    resume: bool = False,
    attribution: Attribution = "standard",
    allow_parity_failure: bool = False,
    observer: Observer | None = None,
) -> Artifact:
    """Compile `teacher` into an INT8 student for `target`, and prove what it is worth.

    Args:
        teacher: a trained module; it is copied, put into eval mode and never changed.
        task: data, metric and loss.
        recipe: a `Recipe`, or the path of its TOML file; `Recipe.default()` where None.
        target: a `Target` or its name; the recipe's, or this machine, where None.
        out: the artifact's directory, empty or new (or, with `resume`, that of the run to continue).
        seed: overrides the recipe's.
        attribution: "full" also trains the student's controls (no distillation, smoothed labels, an untrained
            teacher, from scratch) for the table and the diagnostics.
        allow_parity_failure: finish the artifact although its numbers differ from the trained ones.
        observer: shows progress.

    Raises:
        InputError: teacher, task, recipe, target and out do not fit, and nothing was trained; or the disk is full.
        ParityError: the deployed numbers differ from the trained ones; saved passes are kept.
    """
    if not isinstance(task, Task):
        raise InputError(
            f"task: a {type(task).__name__} is no pqk.Task; make one of your data: Task(train, evaluation)"
        )
    if attribution not in get_args(Attribution):
        raise InputError(f'attribution: "{attribution}"{nearest(attribution, get_args(Attribution))}')
    by_default = recipe is None
    recipe = _recipe(recipe, target, seed, task)
    assert recipe.target is not None
    passes, chosen = recipe.passes, Target.named(recipe.target.name)
    last = check_order(passes)
    if last != Stage.INT8:
        raise InputError(f'recipe: it leaves the student in stage {last}; the last pass must be "convert" or "fuse"')
    if (reason := why_not_for_target(passes, chosen)) is not None:
        raise InputError(f"recipe: {reason}")
    read_tuning(passes)
    for p in passes:
        if isinstance(p, Training) or getattr(p, "recovery_epochs", False):
            task.need_train(p.name)
    if not isinstance(teacher, nn.Module):
        raise InputError(f"teacher: a {type(teacher).__name__} is no torch module")
    if isinstance(teacher, torch.jit.ScriptModule):
        raise InputError("teacher: a scripted module cannot be rewritten; pass the module that it was scripted from")
    half = next((n for n, p in teacher.named_parameters() if p.dtype in (torch.float16, torch.bfloat16)), None)
    if half is not None:
        raise InputError(f"teacher: {half} is in half precision; pass teacher.float(), pqk quantizes from float32")
    if accelerator().num_processes > 1 and attribution == "full":
        raise InputError("attribution full: its extra training runs in one process; compile with one, or use standard")
    teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
    task.check(teacher)
    if by_default:
        recipe = fit_recipe(recipe, teacher, task)
    folder = Path(out)
    identity = _identity(recipe, teacher, task)
    from_main(lambda: _open(folder, identity, resume))
    if (folder / "manifest.json").exists():
        return Artifact.load(folder)
    journal = Journal(folder / ".work" / "journal.jsonl" if is_main_process() else None)
    run = RunContext(recipe.seed, folder / ".work", journal, observer or Silent())
    try:
        program = _run(teacher, task, recipe.passes, chosen, run)
        if is_main_process():
            _finish(program, task, recipe, folder, attribution, allow_parity_failure)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"{folder}: {error.strerror}; make room and go on with --resume") from error
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
    return Artifact.load(folder)


def _run(teacher: nn.Module, task: Task, passes: Sequence[Pass], target: Target, run: RunContext) -> Program:
    """The passes, with a latency oracle where this machine is the target."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    if target.why_not_measured() is not None:
        return run_passes(Program(teacher, student, Stage.MODULE, target, run), task, passes)
    oracle = Oracle(teacher, task, target, passes, run)
    run = oracle.serve(run)
    try:
        return run_passes(Program(teacher, student, Stage.MODULE, target, run), task, passes)
    finally:
        oracle.folder.cleanup()


def _recipe(recipe: Recipe | str | Path | None, target: Target | str | None, seed: int | None, task: Task) -> Recipe:
    if recipe is None:
        name = target.name if isinstance(target, Target) else target
        runtime = "onnxruntime" if name is None else Target.named(name).runtime
        recipe = Recipe.default(task.train is not None, runtime)
    elif isinstance(recipe, str | Path):
        recipe = Recipe.load(recipe)
    elif not isinstance(recipe, Recipe):
        raise InputError(f"recipe: a {type(recipe).__name__} is neither a pqk.Recipe nor the path of one")
    if target is not None:
        name = target.name if isinstance(target, Target) else Target.named(target).name
        recipe = dataclasses.replace(recipe, target=TargetSpec(name=name))
    if recipe.target is None:
        recipe = dataclasses.replace(recipe, target=TargetSpec(name=Target.detect().name))
    if seed is not None and seed < 0:
        raise InputError(f"seed={seed} must not be negative")
    return recipe if seed is None else dataclasses.replace(recipe, seed=seed)


def _identity(recipe: Recipe, teacher: nn.Module, task: Task) -> dict[str, Any]:
    """What a run is a run of: a resume must be of the same."""
    data = {
        "train": None if task.train is None else task.train.fingerprint(),
        "validation": task.validation.fingerprint(),
        "evaluation": task.evaluation.fingerprint(),
    }
    example = digest_of("example", task.example)  # made by the data's own preprocessing, which `data` does not show
    return {"recipe": recipe.dumps(), "teacher": weights_fingerprint(teacher), "data": data, "example": example}


def _open(folder: Path, identity: dict[str, Any], resume: bool) -> None:
    """Rank 0 makes the output directory, or finds the run to continue.

    Raises `InputError` for anything else that is there.
    """
    work = folder / ".work"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; --out names a directory")
    there = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
    if not resume and there:
        raise InputError(f"{folder} is not empty ({', '.join(there[:4])}…); choose another, or continue with --resume")
    if resume and (work / "run.json").exists():
        before = read_json(work / "run.json")
        differ = [k for k in identity if before.get(k, identity[k]) != identity[k]]
        if differ:
            raise InputError(
                f"{folder} holds a run with another {' and '.join(differ)}; it cannot be continued with these"
            )
        return
    begun = there == [".work"] and all(p.name.startswith(".") for p in work.iterdir())  # killed before its first file
    if resume and there and not begun:
        raise InputError(f"{folder} is not empty and holds no run to continue")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {work}: {error.strerror}") from error
    write_json(work / "run.json", identity)


def _finish(
    program: Program, task: Task, recipe: Recipe, folder: Path, attribution: Attribution, allow_parity_failure: bool
) -> None:
    """Emit, prove, and move the finished files into `folder`, the manifest last."""
    proof = folder / ".work" / "proof"
    shutil.rmtree(proof, ignore_errors=True)
    proof.mkdir()
    if program.target.runtime == "onnxruntime":
        emit_onnx(program.student, task.example, proof / "model.onnx", task.input_names, task.output_names, task.axes)
    if program.fused is not None:
        emit_torch(program.fused, task.example, proof / "student.pt2", task.axes)
        one = tuple(x[:1] if x.ndim else x for x in task.example)
        tuning = read_tuning(recipe.passes) or choose_tuning(program.fused, one, gpu_for(program.target.name))
        write_json(proof / TUNING, tuning.document())
    extra = _extra_files(program, task, proof)
    report = evaluate(program, task, recipe.passes, proof, attribution, seed=recipe.seed)
    write_tensors(proof / "student.safetensors", program.student.state_dict())
    write_json(proof / "student.json", {"plan": state(program)["plan"]})
    write_whole(proof / "recipe.toml", lambda p: p.write_text(recipe.dumps()))
    write_whole(proof / "report.json", lambda p: p.write_text(report.dumps()))
    write_whole(proof / "report.md", lambda p: p.write_text(to_markdown(report)))
    contracts = [report.parity, None if report.fusion is None else report.fusion.parity]
    broken = next((c for c in contracts if c is not None and not c.passed), None)
    if broken is not None and not allow_parity_failure:
        raise ParityError(
            f"parity: {broken.first_divergence}. The finished passes and the report are kept in "
            f"{folder / '.work'}; --resume --allow-parity-failure finishes the artifact all the same"
        )
    for name in (*OWN, *extra):
        if (proof / name).exists():
            (proof / name).replace(folder / name)
    write_manifest(folder, _manifest(program, task, recipe, folder))


def _extra_files(program: Program, task: Task, folder: Path) -> tuple[str, ...]:
    """Write what the task ships beside the student; their names."""
    files = {} if task.extra_files is None else task.extra_files(program.student)
    for name, content in files.items():
        if name in (*OWN, "manifest.json") or Path(name).name != name or name.startswith(".") or ".onnx" in name:
            raise InputError(f'task: extra_files gives "{name}", which is no plain name or one of the artifact\'s own')
        write_whole(folder / name, partial(Path.write_bytes, data=content))
    return tuple(files)


def _manifest(program: Program, task: Task, recipe: Recipe, folder: Path) -> dict[str, Any]:
    inputs = zip(task.input_names, task.example, task.axes, strict=True)
    work = read_json(folder / ".work" / "run.json")
    return {
        "pqk": importlib.metadata.version("pqk"),
        "versions": machine_fingerprint()["versions"],
        "target": program.target.name,
        "seed": recipe.seed,
        "teacher": work["teacher"],
        "data": work["data"],
        "inputs": [_describe(n, t, axes) for n, t, axes in inputs],
        "outputs": _outputs(program.student, task),
        "preprocessing": task.preprocessing,
    }


def _describe(name: str, t: torch.Tensor, axes: Sequence[str | None]) -> dict[str, Any]:
    shape = [called or size for called, size in zip(axes, t.shape, strict=True)]
    return {"name": name, "shape": shape, "dtype": str(t.dtype).removeprefix("torch.")}


@torch.no_grad()
def _outputs(student: nn.Module, task: Task) -> list[dict[str, Any]]:
    """Names, shapes and dtypes of the outputs. An axis that gets shorter with the inputs' "sequence" is one, too."""
    outputs = student(*task.example)
    found = tensors(outputs)
    axes: list[list[str | None]] = [[None] * t.ndim for t in found]
    for name in dict.fromkeys(n for names in task.axes for n in names if n):
        cuts = [tuple(slice(None, -1 if n == name else None) for n in names) for names in task.axes]
        shorter = tensors(student(*(t[cut] for t, cut in zip(task.example, cuts, strict=True))))
        for named, whole, part in zip(axes, found, shorter, strict=True):
            named[:] = [name if whole.shape[i] != part.shape[i] else n for i, n in enumerate(named)]
    names = task.output_names or names_of_outputs(outputs)
    return [_describe(*described) for described in zip(names, found, axes, strict=True)]
