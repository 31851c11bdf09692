"""Fine-tuning: rates are chosen on held-out texts, the directory is whole or absent, a killed run goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import text_models as tiny
import torch
from safetensors.torch import load_file

from pqk.errors import InputError
from pqk.models import finetune as module
from pqk.models.encoder import encoder
from pqk.models.finetune import FinetuneJob, accuracy, finetune
from pqk.models.text import text_task

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")


@pytest.fixture
def job(tmp_path: Path) -> FinetuneJob:
    """64 texts, labelled by their first word's place: two steps an epoch."""
    rows = tiny.texts(64)
    labels = [tiny.WORDS.index(r.split()[0]) % 3 for r in rows]
    train = tmp_path / "train.tsv"
    lines = [f"{y}\t{'xyz'[y]}\t{r}\n" for y, r in zip(labels, rows, strict=True)]
    train.write_text("label\tname\ttext\n" + "".join(lines))
    return FinetuneJob(train, train, names="name", rates=(1e-9, 3e-2), epochs=1, batch_size=32, dev_share=0.25)


def test_it_chooses_a_rate_and_writes_a_directory(job: FinetuneJob, tmp_path: Path) -> None:
    base, out = tiny.directory(tmp_path / "base", "Model"), tmp_path / "out"
    job = replace(job, epochs=12)
    notes = finetune(job, out, directory=base)
    assert notes["rate"] == 3e-2 and notes["dev"]["0.03"]["accuracy"] > notes["dev"]["1e-09"]["accuracy"]
    assert json.loads((out / "finetune.json").read_text()) == notes
    model = encoder(out, labels=["x", "y", "z"])
    task = text_task(directory=out, train=job.train, evaluation=job.test, label="name")
    assert accuracy(model, task.evaluation) == pytest.approx(notes["test"])  # type: ignore[arg-type]
    assert not out.with_name(".out.work").exists()
    with pytest.raises(InputError, match="is there already"):
        finetune(job, out, directory=base)


def test_a_killed_run_goes_on(job: FinetuneJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was trained is not trained again, and the end is the same."""
    base = tiny.directory(tmp_path / "base", "Model")
    whole = finetune(job, tmp_path / "whole", directory=base)
    trained: list[str] = []
    train = module.Finetuning.train_at

    def stopping(self: module.Finetuning, rate: float, data: module.TextData, scope: str) -> object:
        trained.append(scope)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(self, rate, data, scope)

    monkeypatch.setattr(module.Finetuning, "train_at", stopping)
    with pytest.raises(KeyboardInterrupt):
        finetune(job, tmp_path / "out", directory=base)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="a run of another job"):
        finetune(replace(job, seed=1), tmp_path / "out", directory=base)
    again = finetune(job, tmp_path / "out", directory=base)
    assert trained == ["rate-1e-09", "rate-0.03", "rate-0.03", "whole"]
    assert {k: v["accuracy"] for k, v in again["dev"].items()} == {k: v["accuracy"] for k, v in whole["dev"].items()}
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1]


def test_a_new_head_is_trained_alone_first(job: FinetuneJob, tmp_path: Path) -> None:
    """It learns where the encoder stands still, which it leaves as it was."""
    base = tiny.directory(tmp_path / "base", "Model")
    job = replace(job, rates=(1e-9,), epochs=1, probe_rate=3e-2)
    found = {n: finetune(replace(job, probe_epochs=n), tmp_path / str(n), directory=base) for n in (0, 40)}
    assert found[40]["test"] > found[0]["test"]
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "40"))
    body = [k for k in before if "encoder.layer" in k]
    assert body and all(torch.allclose(before[k], after[f"bert.{k}"], atol=1e-6) for k in body)
    other = tiny.directory(tmp_path / "other", "Model")
    small = transformers.DistilBertConfig(
        vocab_size=len(tiny.WORDS), dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=24
    )
    transformers.DistilBertModel(small).save_pretrained(other)
    with pytest.raises(InputError, match="is for BERT; of .* --probe-epochs 0"):
        finetune(replace(job, probe_epochs=1), tmp_path / "no", directory=other)


def test_labels_have_no_gaps(job: FinetuneJob, tmp_path: Path) -> None:
    train = tiny.write_tsv(tmp_path / "gap.tsv", [0, 2], ["good", "bad"])
    with pytest.raises(InputError, match="without gaps"):
        finetune(replace(job, train=train, names=None), tmp_path / "out", directory=tiny.directory(tmp_path / "base"))


def test_the_command_line_changes_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[object] = []
    monkeypatch.setattr(module, "finetune", lambda *given: called.extend(given))
    module.main(["sst2", "--out", str(tmp_path / "out"), "--rates", "1e-5", "2e-5", "--epochs", "3"])
    assert called == [
        replace(module.JOBS["sst2"], rates=(1e-5, 2e-5), epochs=3.0), tmp_path / "out", None, module.MINILM
    ]  # fmt: skip
    assert all(len(job.rates) >= 3 for job in module.JOBS.values())
