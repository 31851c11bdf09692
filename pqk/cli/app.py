"""The command line: it parses and shows, the library does the work and never prints.

A command here returns the work as a function that is called when the arguments are known to be right; so torch is
imported only where something is to be done, and `pqk --help` is instant.

Exit codes: 0 done, 2 bad input, 3 parity failure, 4 no student keeps the contract, 1 anything else that failed, 130
stopped by Ctrl-C.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.metadata
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from pqk.core.distributed import is_first_launched
from pqk.errors import ContractError, InputError, ParityError, PqkError
from pqk.quiet import quiet

Work = Callable[[], Any]
"""what a command leaves to do; it makes a `pqk.cli.console.CommandAnswer`"""

app = typer.Typer(
    name="pqk",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class EvaluationChoice(StrEnum):
    standard = "standard"
    full = "full"
    quick = "quick"


class DeviceChoice(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
DataFolder = Annotated[Path | None, typer.Option(help="Folder with the data and the teacher's weights.", metavar="DIR")]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="The recipe.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PASS.KEY=VALUE", help="Change a field of a pass; distill@2.epochs names the second."
    ),
]
TargetName = Annotated[str | None, typer.Option(metavar="NAME", help="What will run the student; see `pqk doctor`.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Instead of the recipe's.")]


def _commands(module: str = "commands") -> Any:
    """A module of this package that does the work; imported late, because it brings torch."""
    # A hundred thousand objects are made that stay: looking through them for garbage took a fifth of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(f"pqk.cli.{module}")
    finally:
        if collecting:
            gc.enable()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pqk {importlib.metadata.version('pqk')}")
        raise typer.Exit


@app.callback(epilog="Start with: pqk check RECIPE.toml")
def pqk(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Compress a trained PyTorch model into an INT8 student that is measurably faster, with the proof beside it."""


@app.command()
def compress(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the artifact goes: a new or empty folder.")],
    data: DataFolder = None,
    target: TargetName = None,
    settings: Settings = None,
    seed: Seed = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out that was stopped.")] = False,
    evaluation: Annotated[
        EvaluationChoice,
        typer.Option(
            "--evaluation",
            "--attribution",
            help="quick measures teacher and student alone; full also trains the controls, without the teacher.",
        ),
    ] = EvaluationChoice.standard,
    allow_parity_failure: Annotated[
        bool, typer.Option("--allow-parity-failure", help="Finish although the deployed numbers differ.")
    ] = False,
    max_drop: Annotated[
        float | None,
        typer.Option(metavar="N", help="Contract: the most that the metric may fall; points for a share."),
    ] = None,
    min_speedup: Annotated[
        float | None, typer.Option(metavar="X", help="Contract: times faster than the teacher in FP32, at least.")
    ] = None,
    max_latency_ms: Annotated[
        float | None, typer.Option("--max-latency-ms", metavar="MS", help="Contract: the longest for one sample.")
    ] = None,
    max_size_mb: Annotated[
        float | None, typer.Option("--max-size-mb", metavar="MB", help="Contract: the largest file.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help='Contract: what the search may take: 30m, 2h or "40 epochs".')
    ] = None,
    cascade: Annotated[
        bool | None,
        typer.Option(
            "--cascade", help="Contract: where no student keeps it alone, the teacher answers what it is unsure of."
        ),
    ] = None,
    as_json: AsJson = False,
) -> Work:
    """Turn a recipe into an artifact: prune, distill, quantize, prove.

    pqk compress my.toml --data data --out out/my

    pqk compress my.toml --out out/short --set distill.epochs=3

    pqk compress my.toml --out out/kept --max-drop 1 --budget 30m
    """
    clauses = {
        "max_drop": max_drop,
        "min_speedup": min_speedup,
        "max_latency_ms": max_latency_ms,
        "max_size_mb": max_size_mb,
        "budget": budget,
        "cascade": cascade,
    }

    return lambda: _commands().compress(
        recipe,
        out,
        data=data,
        target=target,
        settings=settings or [],
        seed=seed,
        resume=resume,
        evaluation=evaluation.value,
        allow_parity_failure=allow_parity_failure,
        clauses={name: value for name, value in clauses.items() if value is not None},
        as_json=as_json,
    )


@app.command()
def compare(
    comparison: Annotated[Path, typer.Argument(metavar="FILE.toml", help="A recipe with variant tables.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where cells and result go: a new or empty folder.")],
    data: DataFolder = None,
    seeds: Annotated[str | None, typer.Option(metavar="N,N", help="Instead of the file's seeds for screening.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the cells in --out; run what is missing.")] = False,
    as_json: AsJson = False,
) -> Work:
    """Train variants of a recipe under one budget on several seeds; a table with intervals.

    Each variant is compiled to INT8 on each seed and paired with the baseline. Exit code 1 where a variant failed.

    pqk compare my_variants.toml --data data --out out/variants --seeds 0,1,2
    """
    given = None if seeds is None else _numbers("--seeds", seeds, 0)

    return lambda: _commands().compare(comparison, out, data=data, seeds=given, resume=resume, as_json=as_json)


@app.command()
def check(
    recipe: RecipeFile,
    data: DataFolder = None,
    target: TargetName = None,
    settings: Settings = None,
    seed: Seed = None,
    as_json: AsJson = False,
) -> Work:
    """Rehearse a recipe before any training: what fails, what it costs.

    Says what cannot be pruned or quantized and why, the student's latency, and the memory and time of the compile.
    Exit code 2 where the compile would fail.

    pqk check my.toml --data data
    """

    return lambda: _commands().check(
        recipe, data=data, target=target, settings=settings or [], seed=seed, as_json=as_json
    )


@app.command()
def benchmark(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An artifact.")],
    batch: Annotated[str, typer.Option(metavar="N,N", help="Batch sizes.")] = "1",
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime.")] = 2,
    rounds: Annotated[int, typer.Option(min=5, help="Turns that each side gets.")] = 30,
    device: Annotated[DeviceChoice, typer.Option(help="Where to run it.")] = DeviceChoice.cpu,
    as_json: AsJson = False,
) -> Work:
    """Time an artifact beside its teacher; nothing is written.

    pqk benchmark out/my --batch 1,32 --threads 2
    """

    return lambda: _commands().benchmark(folder, _numbers("--batch", batch, 1), threads, rounds, device.value)


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An artifact that continues texts.")],
    prompt: Annotated[str, typer.Argument(metavar="TEXT", help="What is continued.")],
    max_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to add, at most.")] = 128,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0 takes the likeliest token; else one is drawn.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Draw from the likeliest with this probability together.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="TEXT is a message in the tokenizer's chat template.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime.")] = 1,
    as_json: AsJson = False,
) -> Work:
    """Continue a text with an artifact, token by token, and say how fast that was.

    pqk generate out/stories "Once upon a time"
    """

    def work() -> Any:
        from pqk.generation.continuation import Sampling

        sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
        return _commands("generation").generate(folder, prompt, sampling, chat=chat, threads=threads, as_json=as_json)

    return work


@app.command()
def kernels(
    folder: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="An artifact that has a student.pt2.")] = None,
    cases: Annotated[
        bool, typer.Option("--cases", help="The cases that kernels are tested on, of all kernels.")
    ] = False,
    arch: Annotated[
        str | None, typer.Option(metavar="NAME,NAME", help="Of sm_80, sm_89, sm_90, sm_100, gfx942; all if left out.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch size that launches are planned for.")] = 1,
    as_json: AsJson = False,
) -> Work:
    """Compile an artifact's GPU kernels ahead of time and count their bytes; no GPU is needed.

    Says of each launch which integer tensor-core instructions its machine code holds, registers, spills, shared memory,
    an upper bound of occupancy, the bytes it moves, and a predicted least time. Exit code 1 where a bar is missed.

    pqk kernels out/my --arch sm_80,sm_90
    """
    if (folder is None) != cases:
        raise InputError("pqk kernels: name an artifact's folder, or say --cases")

    return lambda: _commands().kernels(folder, arch.split(",") if arch else [], batch, as_json=as_json)


@app.command()
def inspect(
    where: Annotated[Path, typer.Argument(metavar="DIR|RECIPE.toml", help="An artifact or a recipe.")],
    as_json: AsJson = False,
) -> Work:
    """Say what each pass of an artifact or recipe does, and why.

    Shows what is in it, what each pass did and declined to do, and the numbers that came of it.

    pqk inspect out/my
    """

    return lambda: _commands("inspection").inspect(where)


@app.command()
def report(
    where: Annotated[Path, typer.Argument(metavar="DIR|report.json", help="An artifact or its report.")],
    as_html: Annotated[bool, typer.Option("--html", help="Write a page with pictures, in one file.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where the page goes; report.html beside report.json if left out."),
    ] = None,
    as_json: AsJson = False,
) -> Work:
    """Show a report, or write it as one HTML file that needs no server and no network.

    Nothing but report.json is read: that of an artifact of any version will do.

    pqk report out/my --html
    """
    if out is not None and not as_html:
        raise InputError("pqk report: --out names the file of --html")

    return lambda: _commands().report(where, as_html=as_html, out=out)


@app.command()
def strangers(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where compiles and results go; what is there is kept.")],
    data: DataFolder = None,
    budget: Annotated[str, typer.Option(metavar="TIME", help='What each search may take: 10m or "4 epochs".')] = "10m",
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="This one; may be given several times.")
    ] = None,
    peers: Annotated[bool, typer.Option("--peers", help="Other tools that are installed, too, each as long.")] = False,
    as_json: AsJson = False,
) -> Work:
    """Compile models that no recipe knows, each under the default contract; a table of what became of them.

    Teachers are trained first, a minute or two each. A run that was stopped goes on when it is given again. Exit code 1
    where a promise does not hold or a compile fails.

    pqk strangers --data data --out out/strangers --budget 10m
    """

    return lambda: _commands().strangers(out, data=data, budget=budget, only=only or [], peers=peers, as_json=as_json)


@app.command()
def passes(as_json: AsJson = False) -> Work:
    """List every pass and distillation term, with all fields."""

    return lambda: _commands().passes()


@app.command()
def schema(
    report: Annotated[bool, typer.Option("--report", help="Of report.json instead.")] = False,
    comparison: Annotated[bool, typer.Option("--comparison", help="Of files for `pqk compare` instead.")] = False,
    as_json: AsJson = False,
) -> Work:
    """Print the JSON Schema of recipes, for editors.

    pqk schema > recipe.schema.json
    """

    return lambda: _commands().schema(report, comparison)


@app.command()
def doctor(as_json: AsJson = False) -> Work:
    """Say what this machine is, and what is missing."""

    return lambda: _commands().doctor()


def _numbers(option: str, text: str, least: int) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [least - 1]
    if min(found) < least:
        wanted = "positive numbers" if least else "numbers from 0 on"
        raise InputError(f'{option} "{text}": write {wanted} with commas between them, such as 1,32')
    return found


def main() -> None:
    """The `pqk` program."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Do what the arguments say; the exit code."""
    as_json = "--json" in arguments
    try:
        work = typer.main.get_command(app).main(list(arguments), prog_name="pqk", standalone_mode=False)
        if not callable(work):  # help or the version was shown
            return int(work or 0)
        # Other libraries' warnings are shown where Python was told to.
        hushed = contextlib.nullcontext() if sys.warnoptions else quiet()
        with hushed, contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            answer = work()
        from pqk.cli.console import write

        write(answer, as_json)
        return answer.exit_code
    except KeyboardInterrupt:
        return _failed(_interrupted(arguments), 130, as_json)
    except BrokenPipeError:  # `pqk passes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ParityError as error:
        return _failed(str(error), 3, as_json)
    except ContractError as error:
        return _failed(str(error), 4, as_json)
    except InputError as error:
        return _failed(str(error), 2, as_json)
    except (PqkError, OSError, MemoryError) as error:
        return _failed(str(error) or "out of memory", 1, as_json)
    except Exception as error:
        if hasattr(error, "format_message"):  # the parser's errors, whose classes differ between versions of typer
            message = error.format_message()  # empty where the help was shown instead
            return _failed(f"{message} {_usage(error)}", 2, as_json) if message or as_json else 2
        if not as_json:
            raise
        return _failed(f"{type(error).__name__}: {error}", 1, as_json)


def _usage(error: Any) -> str:
    path = getattr(getattr(error, "ctx", None), "command_path", "pqk")
    return f"(see {path} --help)"


def _interrupted(arguments: Sequence[str]) -> str:
    """How to go on, where that is possible."""
    if arguments and arguments[0] in ("compress", "compare"):
        again = [a for a in arguments if a != "--resume"]
        line, cells = shlex.join(["pqk", *again, "--resume"]), "cells, " if arguments[0] == "compare" else ""
        return f"stopped; finished {cells}passes and the last checkpoint are kept. Continue with: {line}"
    if arguments and arguments[0] == "strangers":
        return f"stopped; what is done is kept. Continue with: {shlex.join(['pqk', *arguments])}"
    return "stopped"


def _failed(message: str, code: int, as_json: bool) -> int:
    if not is_first_launched():
        return code
    if as_json:
        from pqk.cli.console import write_json

        write_json({"error": message, "exit_code": code})
    else:
        print(f"pqk: {message}", file=sys.stderr)
    return code
