"""The directory that ships, and how it is read back. `model.onnx` is usable without pqk.

model.onnx            the student, INT8, self-contained; not where the target is a GPU
encoder_model.onnx    instead of it, of an encoder-decoder: what reads the source, and
decoder_model_merged.onnx  what generates the target, with keys and values of the source and of the tokens before
student.pt2           the fused student, where the recipe fuses; it needs `import pqk.kernels`
tuning.json           the block sizes that its kernels run with on a GPU
student.safetensors   its tensors, and
student.json          the plan of rewrites that rebuilds the module from the teacher, or from the student of another
                      shape that the compile was given
recipe.toml           what was done
report.json, .md      what it is worth
report.html           a page of it with pictures, where the extra `report` is installed
manifest.json         sha256 and size of every other file, versions, seed, data, target, inputs, outputs, and the sha256
                      of all this; written last
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from pqk.core.onnxruntime_session import DECODER_FILE, encoder_of, session
from pqk.core.pipeline import rebuild
from pqk.core.program import Program, Rewrite, parse_plan
from pqk.core.run_folder import RunFolder
from pqk.data.structures import tensors
from pqk.deploy.cascade import CASCADE_TEACHER, Cascade, Routing
from pqk.deploy.interface import checked_feeds
from pqk.deploy.manifest import FORMAT, check_file, read_manifest
from pqk.deploy.onnx_emitter import emit_onnx_for
from pqk.deploy.torch_emitter import emit_torch, load_student
from pqk.deploy.tuning import NAME as TUNING
from pqk.deploy.tuning import Tuning
from pqk.documents import digest_of_file
from pqk.errors import InputError, first_line
from pqk.files import read_json, read_tensors, write_json, write_sealed, write_tensors, write_whole
from pqk.passes import REWRITES
from pqk.recipe.recipe import Recipe
from pqk.report.html.page import to_html, why_not_drawn
from pqk.report.markdown import to_markdown
from pqk.report.schema import Report
from pqk.target.target import Target
from pqk.task.task import Task

MANIFEST = "manifest.json"
MODEL, FUSED, _ = DEPLOYED = ("model.onnx", "student.pt2", DECODER_FILE)
"""what is run; an artifact has the first or the second or both, or a decoder and its encoder"""
ENCODER_FILE = encoder_of(Path(DECODER_FILE)).name
TENSORS, PLAN = STUDENT = ("student.safetensors", "student.json")
RECIPE = "recipe.toml"
REPORT, REPORT_PAGE, REPORT_HTML = "report.json", "report.md", "report.html"
OWN = (*STUDENT, RECIPE, REPORT, REPORT_PAGE, REPORT_HTML, TUNING, *DEPLOYED, ENCODER_FILE, CASCADE_TEACHER)
"""every file that a compile writes, but for the manifest and what the task adds"""
PROVENANCE = (
    "Written by a compile. Files, folders and modules that are named here are as its recipe named them: weights are",
    "looked for beside the recipe, in the data folder and where pqk is started, modules beside the recipe and where",
    "pqk is started, and what factories are given is relative to where pqk is started. To make this student again, put",
    "this file beside the recipe that was compiled, and start pqk in the same folder, with the same --data.",
)
"""the first lines of a recipe that ships"""
NOT_CUT = "this student is of another shape than its teacher, not cut out of it"


def write_student(program: Program, task: Task, recipe: Recipe, folder: Path, tuning: Tuning | None) -> tuple[str, ...]:
    """Write what is deployed, the student's tensors and plan, and the recipe, into `folder`.

    Returns the names of all files that ship, some of which (the report's) may not be there yet. Raises `InputError`
    where a file cannot be made, or the task's extra files have names that are not plain or the artifact's own.
    """
    if program.target.runtime == "onnxruntime":
        emit_onnx_for(program.student, task, folder / MODEL)
    if program.fused is not None:
        emit_torch(program.fused, task.example, folder / FUSED, task.axes)
    if tuning is not None:
        write_json(folder / TUNING, tuning.document())
    extra = _write_extra_files(program, task, folder)
    write_tensors(folder / TENSORS, program.student.state_dict())
    write_json(folder / PLAN, {"plan": [asdict(r) for r in program.plan]})
    write_whole(folder / RECIPE, lambda p: p.write_text(shipped_recipe(recipe)))
    return (*OWN, *extra)


def deployed_file(folder: Path) -> Path:
    """The file in an artifact that ONNX Runtime is given: model.onnx, or a decoder's, whose encoder lies beside."""
    return folder / (DECODER_FILE if (folder / DECODER_FILE).is_file() else MODEL)


def name_two_files(folder: Path) -> None:
    """Call a decoder in `folder` that has an encoder as Hugging Face's tools do."""
    if (folder / ENCODER_FILE).is_file():
        (folder / MODEL).replace(folder / DECODER_FILE)


def shipped_recipe(recipe: Recipe) -> str:
    """A recipe as an artifact has it: where it names files or modules, with a comment on how it is given again.

    No path of this machine is added: in which folder a compile was started is its user's business.
    """
    named = any(spec is not None for spec in (recipe.teacher, recipe.student, recipe.task))
    return "".join(f"# {line}\n" for line in PROVENANCE if named) + recipe.dumps()


def _write_extra_files(program: Program, task: Task, folder: Path) -> tuple[str, ...]:
    """Write what the task ships beside the student; their names."""
    files = {} if task.extra_files is None else task.extra_files(program.student)
    for name, content in files.items():
        if name in (*OWN, MANIFEST) or Path(name).name != name or name.startswith(".") or ".onnx" in name:
            raise InputError(f'task: extra_files gives "{name}", which is no plain name or one of the artifact\'s own')
        write_whole(folder / name, partial(Path.write_bytes, data=content))
    return tuple(files)


def write_report(report: Report, folder: Path) -> None:
    """Write the report, as data and as pages; that with pictures only where matplotlib is installed."""
    write_whole(folder / REPORT, lambda p: p.write_text(report.dumps()))
    write_whole(folder / REPORT_PAGE, lambda p: p.write_text(to_markdown(report)))
    if why_not_drawn() is None:
        write_html(report, folder / REPORT_HTML)


def write_html(report: Report, path: Path) -> None:
    """Write the report as one page that needs no other file. Its pictures need matplotlib."""
    write_whole(path, lambda p: p.write_text(to_html(report), encoding="utf-8"))


def seal(unfinished: Path, folder: Path, names: Iterable[str], values: dict[str, Any]) -> None:
    """Move the finished files of these names into `folder`, the manifest last, which is written before any moves."""
    files = sorted(path for name in names if (path := unfinished / name).exists())
    _write_manifest(unfinished / MANIFEST, files, values)
    for path in (*files, unfinished / MANIFEST):
        path.replace(folder / path.name)


def write_manifest(folder: Path, values: dict[str, Any]) -> None:
    """Seal a directory: its files are those that are there now."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != MANIFEST and not p.name.startswith("."))
    _write_manifest(folder / MANIFEST, files, values)


def _write_manifest(path: Path, files: Iterable[Path], values: dict[str, Any]) -> None:
    entries = {p.name: {"sha256": digest_of_file(p), "bytes": p.stat().st_size} for p in files}
    write_sealed(path, {"format": FORMAT, "files": entries, **values})


class Artifact:
    """A compiled student on disk. `Artifact.load` checks every file against the manifest.

    Args:
        folder: the artifact's directory.
        manifest: what its `manifest.json` holds.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self._run: Callable[[dict[str, NDArray[Any]]], list[NDArray[Any]]] | None = None

    @staticmethod
    def load(folder: str | Path) -> Artifact:
        """Open a directory.

        Raises:
            InputError: one that is unfinished, incomplete or changed.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            unfinished = RunFolder.of(folder).path.is_dir()
            why = "the compile did not finish; go on with --resume" if unfinished else "it is not a pqk artifact"
            raise InputError(f"{folder} has no {MANIFEST}: {why}")
        manifest = read_manifest(folder / MANIFEST)
        listed = set(manifest["files"])
        unlisted = sorted({REPORT, RECIPE, *STUDENT} - listed)
        if not listed & set(DEPLOYED):
            unlisted.append(" or ".join(DEPLOYED))
        if unlisted:
            raise InputError(f"{folder / MANIFEST} was changed: it does not list {', '.join(unlisted)}")
        for name, entry in manifest["files"].items():
            path = folder / name
            if Path(name).name != name or not path.is_file():
                raise InputError(f"{folder}: {name} is missing; copy the whole directory again")
            check_file(path, entry)
        return Artifact(folder, manifest)

    @property
    def report(self) -> Report:
        return Report.load(self.folder / REPORT)

    @property
    def recipe(self) -> Recipe:
        return Recipe.load(self.folder / RECIPE)

    @property
    def plan(self) -> tuple[Rewrite, ...]:
        """The rewrites that make the student out of the teacher, or out of the student that was given."""
        document = read_json(self.folder / PLAN)
        return parse_plan(document.get("plan") if isinstance(document, dict) else None, self.folder / PLAN)

    @property
    def target(self) -> Target:
        return Target.named(self.manifest["target"])

    def student(self, device: str | torch.device = "cpu") -> fx.GraphModule:
        """The fused student of `student.pt2` as a torch module.

        Raises:
            InputError: where there is none.
        """
        path = self.folder / FUSED
        if not path.exists():
            raise InputError(f'{self.folder} has no student.pt2: its recipe does not end in "fuse"')
        if (self.folder / TUNING).exists():
            Tuning.load(self.folder / TUNING).install()
        return load_student(path, device)

    def run(self, *inputs: NDArray[Any] | torch.Tensor) -> Any:
        """Outputs of `model.onnx` in ONNX Runtime: an array, or a dict by name where there are several.

        Where there is only a `student.pt2`, of that on the CPU, by the reference bodies of its operators. Of a cascade
        the teacher answers the samples that the student is not sure of.

        Raises:
            InputError: inputs do not have the shapes and dtypes of the manifest, or a free axis has a size that the
                model does not take.
        """
        arrays = [x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x) for x in inputs]
        feeds = checked_feeds(self.manifest, arrays)
        if self._run is None:
            self._run = self._runner()
        try:
            arrays = self._run(feeds)
        except Exception as error:  # onnxruntime's exceptions share no public base class
            shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in feeds.items())
            raise InputError(f"run: the student fails on {shapes}: {first_line(error)}") from error
        names = [o["name"] for o in self.manifest["outputs"]]
        if len(names) != len(arrays):
            raise InputError(f"run: the student has {len(arrays)} outputs, and its manifest says {names}")
        outputs = dict(zip(names, arrays, strict=True))
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs

    @property
    def routing(self) -> Routing | None:
        """When the student's answer is taken and not its teacher's; None: it always is."""
        entry = self.manifest.get("cascade")
        return None if entry is None else Routing(float(entry["temperature"]), float(entry["threshold"]))

    def _runner(self) -> Callable[[dict[str, NDArray[Any]]], list[NDArray[Any]]]:
        onnx = deployed_file(self.folder)
        if not onnx.exists():
            return partial(_run_torch, self.student())
        student = partial(session(onnx).run, None)
        if self.routing is None:
            return student
        return Cascade(student, partial(session(self.folder / CASCADE_TEACHER).run, None), self.routing)

    def example(self, batch: int) -> dict[str, NDArray[Any]]:
        """Random feeds of that batch size, from a fixed seed, in sizes and ranges that the model was made for.

        Free axes other than the batch have the size of the task's example; integers are in the range that was seen. An
        artifact that does not say these gets 16, and 0 or 1.

        Raises:
            InputError: the model does not take a batch of that size.
        """
        rng = np.random.default_rng(0)
        feeds = {}
        for s in self.manifest["inputs"]:
            shape = [batch if i == 0 else self._example_size(n) for i, n in enumerate(s["shape"])]
            kind = np.dtype(s["dtype"])
            least, most = s.get("range", (0, 1))
            drawn = rng.standard_normal(shape) if kind.kind == "f" else rng.integers(least, most + 1, shape)
            feeds[s["name"]] = drawn.astype(kind)
        return checked_feeds(self.manifest, list(feeds.values()))

    def _example_size(self, size: int | str) -> int:
        return self.manifest.get("axes", {}).get(size, {"example": 16})["example"] if isinstance(size, str) else size

    @property
    def given(self) -> bool:
        """Whether the compile was given a student of another shape; False: it was cut out of the teacher."""
        return self.manifest.get("student") is not None

    def rebuild(self, teacher: nn.Module | None = None, student: nn.Module | None = None) -> nn.Module:
        """Replays the plan on a copy of what the student began as, filled with the saved tensors.

        Args:
            teacher: what the student was cut out of; its weights do not matter.
            student: the network of another shape that the compile was given, where it was `given` one; likewise.

        Returns:
            The student as a torch module. Of what is not passed the recipe's factory is called.

        Raises:
            InputError: the recipe names no factory, the plan does not fit, or the student was not cut out of the
                teacher that was passed.
        """
        if self.given and student is None and teacher is not None and self.recipe.student is None:
            raise InputError(f"rebuild: {self.folder}: {NOT_CUT}; pass the module that it was given as student=…")
        if not self.given and student is not None:
            raise InputError(f"rebuild: the student of {self.folder} was cut out of its teacher; pass it as teacher=…")
        weights, _ = read_tensors(self.folder / TENSORS)
        example = tuple(torch.from_numpy(x) for x in self.example(2).values())
        origin = student if self.given else teacher
        if origin is None:
            origin = self._student(teacher) if self.given else self._teacher()
        return rebuild(origin, example, self.plan, REWRITES, weights, "student" if self.given else "teacher")

    def _teacher(self) -> nn.Module:
        from pqk.recipe.factories import load_teacher

        spec = self.recipe.teacher
        if spec is None:
            raise InputError("rebuild: this artifact was compiled from a module in Python; pass it as teacher=…")
        return load_teacher(type(spec)(factory=spec.factory, arguments=spec.arguments), beside=self.folder)

    def _student(self, teacher: nn.Module | None) -> nn.Module:
        from pqk.recipe.factories import load_student

        recipe = self.recipe
        spec = recipe.student
        if spec is None:
            raise InputError(
                f"rebuild: {NOT_CUT}, and it was given as a module in Python; pass that module as student=…"
            )
        if teacher is None and recipe.teacher is not None:
            teacher = self._teacher()  # its factory may have a parameter for it
        bare = type(spec)(factory=spec.factory, arguments=spec.arguments)
        return load_student(bare, teacher, recipe.seed, beside=self.folder)


def _run_torch(student: fx.GraphModule, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    with torch.inference_mode():
        return [t.numpy() for t in tensors(student(*(torch.from_numpy(np.array(x)) for x in feeds.values())))]
