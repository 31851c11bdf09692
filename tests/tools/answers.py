"""What a compiled encoder-decoder is worth: exact matches, nats, bytes, and times beside its teacher's files in turn.

    python tests/tools/answers.py out/sorting --teacher out/sorting_teacher --out models/results/sorting.json

For the words of `pqk.models.sorting`. The teacher is deployed as the student is, in two files with a cache, in FP32,
and in the INT8 that ONNX Runtime's own dynamic quantization makes of those. Times are of the fastest call of each
round, in which all files take turns, as other work disturbs the slower ones; ratios have 95 % intervals over rounds.
Exact matches are of greedy decoding through the files.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pqk.bench.baselines import why_not_quantized
from pqk.bench.measure import THREADS, sessions_in_turn
from pqk.bench.statistics import bootstrap_ratio
from pqk.core.onnxruntime_session import OnnxModel, session, size_of
from pqk.deploy.artifact import Artifact, deployed_file
from pqk.deploy.onnx_emitter import emit_onnx_for
from pqk.files import write_json
from pqk.models.encoder_decoder import encoder_decoder
from pqk.models.sorting import EVALUATED, exact_match, pairs, sorting_task
from pqk.target.machine import machine_fingerprint

BEGIN, END, LONGEST = 0, 1, 16


def greedy(run: Any) -> Callable[[Sequence[int]], list[int]]:
    """What two files generate from the tokens of a source, by the likeliest token each time."""
    outputs = [o.name for o in run.decoder.get_outputs()]
    pasts = {i.name: i.name.replace("past_key_values", "present") for i in run.decoder.get_inputs() if "past" in i.name}

    def answer(source: Sequence[int]) -> list[int]:
        ids, begin = np.array([source]), np.array([[BEGIN]])
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        feeds = run.feeds_of_decoder({**given, "decoder_input_ids": begin, "decoder_attention_mask": begin + 1})
        found: list[int] = []
        while len(found) < LONGEST and (not found or found[-1] != END):
            made = dict(zip(outputs, run.decoder.run(None, feeds), strict=True))
            found.append(int(made["logits"][0, -1].argmax()))
            feeds = {**feeds, "input_ids": np.array([found[-1:]]), **{name: made[p] for name, p in pasts.items()}}
        return found

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--teacher", type=Path, required=True, help="the Hugging Face directory it was compiled from")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=THREADS, help="of ONNX Runtime")
    parser.add_argument("--beside", default="nothing else ran", help="what else ran on the machine")
    options = parser.parse_args()
    artifact, teacher = Artifact.load(options.artifact), encoder_decoder(options.teacher)
    task, held = sorting_task(directory=options.teacher), pairs(EVALUATED, 2)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        files = {n: Path(name) / f"{n}.onnx" for n in ("teacher", "dynamic")}
        emit_onnx_for(teacher, task, files["teacher"])
        why = why_not_quantized("teacher_dynamic", files["teacher"], files["dynamic"], task, artifact.target)
        if why is not None:
            del files["dynamic"]
        files["student"] = deployed_file(artifact.folder)
        like, networks = teacher(*task.example), dict[str, Any]()
        runs = {n: session(path, threads=options.threads) for n, path in files.items()}
        for n, path in files.items():
            networks[n] = {
                "bytes": size_of(path),
                "exact_match": exact_match(greedy(runs[n]), held),
                "log_likelihood": task.score(OnnxModel(path, like), task.evaluation),
            }
        for what in ("", *task.timed):
            feeds = task.feeds(1, what)
            fastest = sessions_in_turn([*runs.values()], feeds, options.rounds).min(axis=2)
            for n, times in zip(runs, fastest, strict=True):
                ratio = bootstrap_ratio(fastest[0] / times)
                networks[n][what or "a token after others"] = {
                    "ms": float(np.median(times)), "ratio": ratio.ratio, "low": ratio.low, "high": ratio.high,
                }  # fmt: skip
    document = {
        "networks": networks,
        "without_dynamic": why,
        "conditions": {
            "threads": options.threads, "batch": 1, "rounds": options.rounds, "held_out": EVALUATED,
            "source_tokens": task.example[0].shape[1], "kept_tokens": task.example[2].shape[1] - 1,
            "machine": machine_fingerprint(), "beside": options.beside,
        },
    }  # fmt: skip
    write_json(options.out, document)


if __name__ == "__main__":
    main()
