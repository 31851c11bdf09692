"""Ahead-of-time compilation of kernels, and what their machine code says.

Triton compiles for a GPU that is not there: PTX and LLVM need only its name. The machine code then tells what no test
of numbers can: whether integer matrix instructions were chosen, how many registers a program takes, whether they
spilled to memory, whether its shared memory fits.

Compiling needs a process in which Triton is not interpreted, so it happens in one of its own, `python -m pqk.codegen`,
which reads jobs as JSON on stdin and writes one line of JSON for each.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pqk.errors import PqkError
from pqk.gpu.roofline import arch_named, occupancy
from pqk.kernels.common.launch import Launch, signature
from pqk.kernels.common.triton import TRITON_MISSING
from pqk.scratch import ScratchFolder

INTEGER = re.compile(r"IMMA|IGMMA|UTCIMMA|v_s?mfmac?_i32")
"""matrix instructions whose accumulator is an integer: of a warp, of Hopper's warp group, of Blackwell's tensor memory,
and AMD's; all four take int8"""
MATRIX = re.compile(r"\w*MMA\b|v_s?mfma")
SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
SPILL = ("STL", "LDL")
"""NVIDIA's stores to and loads from a thread's local memory: Triton's kernels have no other use of it"""


@dataclass(frozen=True)
class CompileJob:
    """One kernel to compile for one architecture, as JSON would have it."""

    kernel: str
    """`module:function`"""
    arch: str
    types: dict[str, str]
    """of every parameter, in Triton's words"""
    constants: dict[str, Any]
    attributes: list[tuple[int, list[list[Any]]]]
    """what is known of a parameter's value, by its place"""
    num_warps: int
    num_stages: int

    @property
    def key(self) -> str:
        """The same for jobs that yield the same code."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Code:
    """What the machine code of one job says."""

    matrix: dict[str, int]
    """matrix instructions by name, and how many of each stand in the code"""
    registers: int
    """32-bit registers a lane"""
    spills: int
    """instructions (NVIDIA) or registers (AMD) that go through memory for want of registers"""
    shared: int
    """bytes a program"""
    tensor_memory: int
    """columns a program; Blackwell only"""
    occupancy: float
    """an upper bound: see `pqk.roofline.occupancy`; 0 where a program does not fit on a core"""

    @property
    def integer(self) -> list[str]:
        """The integer matrix instructions among them."""
        return [name for name in self.matrix if INTEGER.match(name)]


def job(run: Launch, arch: str) -> CompileJob:
    """What compiling a launch for an architecture takes. Its tensors may be on any device, `meta` too."""
    function = run.kernel.fn
    types, constants, known = signature(run)
    attributes = {place: list(facts) for (place,), facts in known.items()}
    if arch_named(arch).amd:  # whose launcher says more: offsets of 32 bits reach all of a small tensor
        for i, name in enumerate(run.kernel.arg_names):
            value = run.args.get(name)
            if isinstance(value, Tensor) and name not in constants and value.untyped_storage().nbytes() < 2**31:
                attributes.setdefault(i, []).append(["tt.pointer_range", 32])
    return CompileJob(
        kernel=f"{function.__module__}:{function.__name__}",
        arch=arch,
        types=types,
        constants=constants,
        attributes=sorted(attributes.items()),
        num_warps=run.num_warps,
        num_stages=run.num_stages,
    )


def compile_all(
    jobs: Sequence[CompileJob], workers: int = 1, advance: Callable[[int], None] | None = None
) -> list[Code | str]:
    """The code of each job, or the reason why it did not compile. Equal jobs are compiled once.

    `workers` processes share the work; `advance` is called with 1 for each job that is done.
    """
    if TRITON_MISSING is not None:
        return [TRITON_MISSING] * len(jobs)
    distinct = list({each.key: each for each in jobs}.values())
    shares = [distinct[i::workers] for i in range(workers)]
    with ThreadPoolExecutor(max_workers=workers) as pool:
        results = dict(
            pair for share in pool.map(lambda s: dict(_compiled(s, advance)), shares) for pair in share.items()
        )
    return [results[each.key] for each in jobs]


def _compiled(jobs: Sequence[CompileJob], advance: Callable[[int], None] | None) -> Iterator[tuple[str, Code | str]]:
    """Results by key. A compiler that dies takes its process along; the next process goes on behind the culprit."""
    queue = list(jobs)
    while queue:
        with worker("pqk.gpu.codegen", [asdict(each) for each in queue], interpreted=False) as (lines, died):
            for line in lines:
                result = json.loads(line)
                yield queue.pop(0).key, Code(**result) if isinstance(result, dict) else str(result)
                if advance is not None:
                    advance(1)
            if queue:
                yield queue.pop(0).key, died()
                if advance is not None:
                    advance(1)


@contextlib.contextmanager
def worker(module: str, request: Any, *, interpreted: bool) -> Iterator[tuple[Iterable[str], Callable[[], str]]]:
    """The lines that `python -m module` answers to a request (JSON on stdin), and what to say if it ends too early.

    Whether Triton interprets or compiles is settled when a process imports it, hence one for either.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if interpreted else {}
    with tempfile.TemporaryFile("w+") as question, tempfile.TemporaryFile("w+") as errors:
        json.dump(request, question)
        question.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=question, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
        )  # fmt: skip

        def died() -> str:
            code = process.wait()
            errors.seek(0)
            words = errors.read().strip().splitlines()
            return f"python -m {module} ended with exit code {code}: {' '.join(words[-3:]) or 'it said nothing'}"

        assert process.stdout is not None
        try:
            with process.stdout:
                yield process.stdout, died
        finally:
            process.kill()
            process.wait()


def answer(work: Callable[[Any], Iterable[Any]]) -> None:
    """The other end of `worker`: a line of JSON for each result of `work(request)`. Other output goes to stderr."""
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        for result in work(json.load(sys.stdin)):
            out.write(json.dumps(result) + "\n")
            out.flush()


# In the worker


def compile_one(each: CompileJob) -> Code:
    """Compile and read the code. Triton must not be interpreted here. Raises what Triton raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arch = arch_named(each.arch)
    module, _, name = each.kernel.partition(":")
    function = getattr(importlib.import_module(module), name)
    attributes = {(place,): facts for place, facts in each.attributes}
    target = GPUTarget("hip", arch.name, arch.lanes) if arch.amd else GPUTarget("cuda", int(arch.name[3:]), arch.lanes)
    made = triton.compile(
        ASTSource(function, each.types, each.constants, attributes),
        target=target,
        options={"num_warps": each.num_warps, "num_stages": each.num_stages, "enable_fp_fusion": False},
    )
    read = read_amd(made.asm["amdgcn"]) if arch.amd else read_nvidia(made.asm["cubin"])
    shared, columns = made.metadata.shared, getattr(made.metadata, "tmem_size", None) or 0
    # The compiler may add warps of its own to those asked for, as warp specialization does.
    bound = occupancy(arch, made.metadata.num_warps, read["registers"], shared, columns)
    return Code(**read, shared=shared, tensor_memory=columns, occupancy=bound)


def read_nvidia(cubin: bytes) -> dict[str, Any]:
    """Instructions, registers and spills of a cubin, from NVIDIA's disassembler. Raises `PqkError` if it refuses."""
    from triton import knobs

    with ScratchFolder("codegen") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-sass", "--dump-resource-usage", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
    registers = re.search(r"\bREG:(\d+)", done.stdout)
    count = Counter(SASS.findall(done.stdout))
    if done.returncode or registers is None or not count:
        raise PqkError(f"cuobjdump cannot read the kernel: {(done.stderr or done.stdout).strip()[-500:]}")
    return {
        "matrix": {name: n for name, n in sorted(count.items()) if MATRIX.match(name)},
        "registers": int(registers[1]),
        "spills": sum(n for name, n in count.items() if name.partition(".")[0] in SPILL),
    }


def read_amd(assembly: str) -> dict[str, Any]:
    """The same of AMD's assembly text, from the metadata that LLVM puts at its end."""

    def number_of(name: str) -> int:
        match = re.search(rf"^\s*\.{name}:\s+(\d+)", assembly, re.MULTILINE)
        if match is None:
            raise PqkError(f"the assembly does not say its {name}")
        return int(match[1])

    count = Counter(re.findall(r"^\s+(v_s?mfma\w+)", assembly, re.MULTILINE))
    return {
        "matrix": dict(sorted(count.items())),
        "registers": number_of("vgpr_count"),  # accumulation registers are among them
        "spills": number_of("vgpr_spill_count"),  # scalar registers spill to lanes of vector ones, not to memory
    }


def _compile_each(jobs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any] | str]:
    """The worker: the fields of each job's code, or a reason in words."""
    for each in jobs:
        try:
            yield asdict(compile_one(CompileJob(**each)))
        except Exception as error:  # Triton, LLVM and ptxas raise what they like; all of it is the answer
            yield f"{type(error).__name__}: {str(error).strip()[:1000]}"


if __name__ == "__main__":
    answer(_compile_each)
