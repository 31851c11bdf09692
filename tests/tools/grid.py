"""What training on the grid of MatMulNBits saves of a causal model's decisions.

    python tests/tools/grid.py --directory DIR --texts FILE [--out FILE]

The model in a Hugging Face directory becomes INT8 in blocks of 32, with weights of 8 and of 4 bits, as it is and after
distillation on exactly what the kernel computes. Each file runs in ONNX Runtime beside the model in FP32: on held-out
texts, how often both hold the same token for the next one most likely (teacher forced), nats per token, and how far the
greedy continuations of their first words are the same.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from held_out import Greedy, answers, compared

from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.deploy.onnx_emitter import emit_onnx_for
from pqk.files import write_json
from pqk.knowledge import KLDivergence
from pqk.models.decoder import decoder
from pqk.models.language import language_task
from pqk.passes import Capture, Convert, Distill, Quantize
from pqk.quant.blocks import WeightBits
from pqk.target.machine import machine_fingerprint
from pqk.target.target import Target
from pqk.task.task import Task


def copied(program: Program) -> Program:
    """With a student of its own."""
    return replace(program, student=copy.deepcopy(program.student))


def files(bits: WeightBits, program: Program, task: Task, folder: Path, options: argparse.Namespace) -> dict[str, Path]:
    """Written without training and after it."""
    rounded = Quantize(activations="blockwise", weight_bits=bits).apply(program, task)
    trained = Distill(
        epochs=options.epochs, learning_rate=options.rates[options.bits.index(bits)], optimizer="adamw",
        weight_decay=0.0, terms=(KLDivergence(temperature=1.0),),
    )  # fmt: skip
    found = {}
    for name in ("before", "after"):
        if name == "after":
            rounded = trained.apply(rounded, task)
        found[name] = folder / f"{bits}_{name}.onnx"
        emit_onnx_for(Convert().apply(copied(rounded), task).student, task, found[name])
    return found


def measured(options: argparse.Namespace) -> dict[str, Any]:
    rows = [json.loads(line)["text"] for line in options.texts.read_text().splitlines()]
    held, tuned = rows[-options.held_out :], rows[: options.train]
    model = decoder(options.directory)
    task = language_task(
        directory=options.directory, train={"text": tuned}, validation={"text": tuned[:64]}, evaluation={"text": held},
        batch_size=options.batch_size, max_length=options.length,
    )  # fmt: skip
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        emit_onnx_for(model, task, folder / "float.onnx")
        greedy = Greedy(options.greedy, options.prompt, options.new_tokens)
        floats = answers(folder / "float.onnx", task, options.threads, greedy)
        result["float"] = {"nats_per_token": round(floats.nats, 4), "tokens": len(floats.choices)}
        start = Program(model, model, Stage.MODULE, Target.detect(), RunContext(seed=options.seed))
        captured = Capture().apply(copied(start), task)
        for bits in options.bits:
            began = time.time()
            found = files(bits, copied(captured), task, folder, options)
            row: dict[str, Any] = {
                n: compared(answers(p, task, options.threads, greedy), floats) for n, p in found.items()
            }
            before, after = (1 - row[n]["agreement"] for n in ("before", "after"))
            row["disagreement_left"] = round(after / before, 3)
            row["bytes"] = found["after"].stat().st_size
            result[f"{bits} bits"] = row | {"seconds": round(time.time() - began)}
            sys.stderr.write(json.dumps({bits: row}) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--directory", type=Path, required=True, help="a causal model of Hugging Face")
    parser.add_argument("--texts", type=Path, required=True, help='a .jsonl file of {"text": …}; its last are held out')
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4], choices=(8, 4))
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--train", type=int, default=2000, help="the first so many texts are learned from")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[1e-4, 5e-4], help="learning rates, one for each of the bits"
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a text")
    parser.add_argument("--greedy", type=int, default=100, help="texts that are continued")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="write the result there too")
    options = parser.parse_args()
    if len(options.rates) != len(options.bits):
        parser.error(f"{len(options.bits)} widths and {len(options.rates)} learning rates: give one for each")
    torch.set_num_threads(options.threads)
    result = measured(options)
    result["conditions"] = {
        **{k: v for k, v in vars(options).items() if k not in ("out", "directory", "texts")},
        "model": options.directory.name,
        "texts": options.texts.name,
        "protocol": "ONNX Runtime on both sides; AdamW, Kullback-Leibler divergence from the model in FP32 at T = 1",
    }
    result["machine"] = machine_fingerprint()
    if options.out is not None:
        write_json(options.out, result)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
