"""Tokens a second of models that continue texts, in turn: artifacts, ONNX files, and GGUF files in llama.cpp.

    python tests/tools/tokens.py teacher=out/smollm2 student=out/smollm2_stories/model.onnx \
        q8=out/q8.gguf --llama-python LLAMA/bin/python --threads 1 2 --out out/tokens.json

A Hugging Face directory is the FP32 file that pqk makes of it, without training, or what is said behind it, of the pass
`quantize` and of `pqk.task.decoder_form`: `small=out/smollm2,activations=blockwise,kv_cache=int8,attention=grouped`. A
directory with `layers=4` behind it is a Llama of random weights, as wide as SmolLM2, with the directory's tokenizer.
Every contender lives in a process of its own. In a round each continues the same prompt by the same number of tokens,
one after the other, while the others wait; ratios to the first one are taken within rounds. llama.cpp needs a Python
that has llama-cpp-python, which may be another one than this. With `--texts` (a .jsonl file of {"text": …}) the last of
them are what the ONNX files are asked, too: nats per token, and how often they and the first one find the same token
most likely.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Turn = Callable[[list[int], int], dict[str, float]]
"""(tokens of a prompt, tokens to add) -> milliseconds to the first, and of each after it"""


# ---- contenders, each in its process; nothing here needs pqk


def onnx_turn(path: str, threads: int) -> Turn:
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 4
    run = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {i.name: i for i in run.get_inputs()}
    names = [o.name for o in run.get_outputs()]
    pasts = [n for n in inputs if n.startswith("past_key_values.")]

    kinds = {n: np.int8 if inputs[n].type == "tensor(int8)" else np.float32 for n in pasts}

    def turn(prompt: list[int], count: int) -> dict[str, float]:
        kept = {n: np.zeros((1, inputs[n].shape[1], 0, inputs[n].shape[3]), kinds[n]) for n in pasts}
        new, total, marks = np.array([prompt]), 0, [time.perf_counter()]
        for _ in range(count):
            total += new.shape[1]
            feeds = {"input_ids": new, "attention_mask": np.ones((1, total), np.int64), **kept}
            if "position_ids" in inputs:
                feeds["position_ids"] = np.arange(total - new.shape[1], total)[None]
            found = dict(zip(names, run.run(None, feeds), strict=True))
            kept = {n: found[n.replace("past_key_values", "present")] for n in pasts}
            new = found["logits"][:, -1:].argmax(-1)
            marks.append(time.perf_counter())
        return paces(marks)

    return turn


def llama_turn(path: str, threads: int) -> Turn:
    import llama_cpp

    model = llama_cpp.Llama(path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def turn(prompt: list[int], count: int) -> dict[str, float]:
        model.reset()
        marks = [time.perf_counter()]
        for _, _ in zip(range(count), model.generate(prompt, temp=0.0, reset=True), strict=False):
            marks.append(time.perf_counter())
        return paces(marks)

    return turn


def paces(marks: list[float]) -> dict[str, float]:
    return {"first_ms": 1e3 * (marks[1] - marks[0]), "token_ms": 1e3 * (marks[-1] - marks[1]) / (len(marks) - 2)}


def work(path: str, threads: int) -> None:
    """A contender's loop: a line of JSON in, a line out."""
    turn = (llama_turn if path.endswith(".gguf") else onnx_turn)(path, threads)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(turn(**json.loads(line))), flush=True)


# ---- rounds


QUANTIZED = ("activations", "kv_cache")
"""what is said to the pass `quantize`; the rest is the form of the file"""
TEXTS = {"text": ["Once upon a time there was a little girl who had a red ball.", "One day a dog ran by."]}


def emitted(directory: Path, said: dict[str, str], out: Path) -> Path:
    """The file with a cache that pqk makes of a Hugging Face directory: in FP32, or quantized without training."""
    from pqk.core.program import Program, Stage
    from pqk.core.run_context import RunContext
    from pqk.deploy.onnx_emitter import emit_onnx_for
    from pqk.models.decoder import decoder
    from pqk.models.language import language_task
    from pqk.passes import Convert, Quantize
    from pqk.passes.capture.capture import capture
    from pqk.target.target import Target

    if "layers" in said:
        directory = wide_llama(directory, int(said["layers"]), out.with_suffix(""))
    form = {key: value for key, value in said.items() if key not in (*QUANTIZED, "layers")}
    task = language_task(
        directory=directory, train=None, evaluation=TEXTS, validation=TEXTS, context=8, decoder_form=form
    )
    model = decoder(directory)
    quantized = any(key in said for key in QUANTIZED)
    if quantized:
        graph = capture(model, task.example, axes=task.axes)
        program = Program(model, graph, Stage.GRAPH, Target.named("x86-avx2"), RunContext())
        quantize: Any = {key: said[key] for key in QUANTIZED if key in said}
        program = Convert().apply(Quantize(**quantize).apply(program, task), task)
    emit_onnx_for(program.student if quantized else model, task, out)
    return out


def wide_llama(directory: Path, layers: int, out: Path) -> Path:
    """`out`, made a directory of a Llama of random weights, as wide as SmolLM2-135M, for the tokens of `directory`."""
    import shutil

    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(out)
    for file in (*directory.glob("tokenizer*"), *directory.glob("special_tokens_map.json")):
        shutil.copy(file, out)
    return out


def file_of(given: str, out: Path) -> str:
    """The file that a contender is: itself, or `out`, made of a directory and the form behind it."""
    directory, *form = given.split(",")
    if not Path(directory).is_dir():
        return given
    return str(emitted(Path(directory), dict(entry.split("=", 1) for entry in form), out))


class Contender:
    def __init__(self, name: str, path: str, threads: int, python: str) -> None:
        self.name = name
        command = [python, __file__, "--worker", path, "--threads", str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self.answer() != "ready":
            sys.exit(f"{name} ({path}) does not start")

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def turn(self, prompt: list[int], count: int) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompt": prompt, "count": count}) + "\n")
        self.process.stdin.flush()
        found: dict[str, float] = json.loads(self.answer())
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def kept_bytes(path: str) -> int:
    """What a file keeps of a token."""
    from pqk.core.onnxruntime_session import Continuing, session
    from pqk.core.steps import Steps

    run = session(Path(path))
    assert isinstance(run, Continuing), f"{path} keeps nothing"
    return Steps(run).kept_bytes


def measure(options: argparse.Namespace, threads: int) -> dict[str, Any]:
    """Medians of every contender, and of its ratio to the first with its bootstrap interval of 95 %."""
    import numpy as np

    named = options.named
    pythons = [options.llama_python if path.endswith(".gguf") else sys.executable for _, path in named]
    contenders = [Contender(n, path, threads, python) for (n, path), python in zip(named, pythons, strict=True)]
    prompt = [1 + i % 200 for i in range(options.prompt)]
    rounds: list[list[dict[str, float]]] = []
    try:
        for round_number in range(options.rounds + 1):
            turns = [c.turn(prompt, options.tokens) for c in contenders]
            if round_number:  # the first warms up
                rounds.append(turns)
    finally:
        for c in contenders:
            c.close()
    found = {}
    draws = np.random.default_rng(0).integers(0, len(rounds), (2000, len(rounds)))
    for i, c in enumerate(contenders):
        entry: dict[str, Any] = {"file_mb": round(Path(named[i][1]).stat().st_size / 2**20, 2)}
        if named[i][1].endswith(".onnx"):
            entry["kept_bytes"] = kept_bytes(named[i][1])
        for key in ("first_ms", "token_ms"):
            times = np.array([r[i][key] for r in rounds])
            ratios = np.array([r[0][key] / r[i][key] for r in rounds])
            low, high = np.percentile(np.median(ratios[draws], 1), [2.5, 97.5])
            entry[key] = float(np.median(times))
            entry[key.replace("_ms", "_ratio")] = [float(np.median(ratios)), float(low), float(high)]
        entry["tokens_per_second"] = 1e3 / entry["token_ms"]
        found[c.name] = entry
    return found


def decisions(options: argparse.Namespace, directory: Path) -> dict[str, dict[str, Any]]:
    """What every ONNX file says of the held-out texts, beside the first one."""
    from held_out import answers, compared

    from pqk.models.language import language_task

    rows = [json.loads(line)["text"] for line in options.texts.read_text().splitlines()]
    task = language_task(
        directory=directory, train=None, evaluation={"text": rows[-options.held_out :]}, validation=TEXTS
    )
    files = {name: Path(path) for name, path in options.named if path.endswith(".onnx")}
    found = {name: answers(path, task, max(options.threads)) for name, path in files.items()}
    first = next(iter(found.values()))
    tokens = len(first.choices)
    return {name: compared(of_file, first) | {"tokens": tokens} for name, of_file in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contenders", nargs="*", metavar="NAME=FILE", help="the first is what ratios are to")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to add")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--llama-python", default=sys.executable, help="a Python that has llama-cpp-python")
    parser.add_argument("--texts", type=Path, help="held-out texts for the ONNX files")
    parser.add_argument("--held-out", type=int, default=80, help="the last so many of them")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.threads[0])
        return
    from pqk.target.machine import machine_fingerprint

    given = [entry.partition("=")[::2] for entry in options.contenders]
    with tempfile.TemporaryDirectory() as folder:
        options.named = [(n, file_of(path, Path(folder) / f"{n}.onnx")) for n, path in given]
        results = {str(threads): measure(options, threads) for threads in options.threads}
        first = Path(given[0][1].partition(",")[0])
        said = {} if options.texts is None else {"held_out": decisions(options, first)}
    conditions = {key: getattr(options, key) for key in ("prompt", "tokens", "rounds")}
    document = {"conditions": conditions | {"machine": machine_fingerprint()}, "threads": results, **said}
    text = json.dumps(document, indent=1) + "\n"
    if options.out is not None:
        options.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
