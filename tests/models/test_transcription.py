"""Sounds with their texts as a task: what a Whisper model is given of them, and the two files that come of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import translating_models as tiny

from pqk import compress
from pqk.core.onnxruntime_session import EncoderDecoderSession, session
from pqk.deploy.artifact import deployed_file
from pqk.errors import InputError
from pqk.evaluation.settings import Evaluation
from pqk.generation.continuation import Continuation
from pqk.models.encoder_decoder import encoder_decoder
from pqk.models.seq2seq import seq2seq_task
from pqk.models.transcription import transcription_task
from pqk.recipe.recipe import Recipe
from pqk.task.classes import IGNORED

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

RATE = 16_000


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Whisper model of sounds of a second."""
    folder = tiny.directory(tmp_path_factory.mktemp("model") / "whisper", "whisper", max_source_positions=50)
    transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    return folder


def sounds(count: int) -> dict[str, list[Any]]:
    time = np.arange(RATE // 4) / RATE
    said = [np.sin(2 * np.pi * (200 + 50 * i) * time).astype(np.float32) for i in range(count)]
    return {"audio": said, "text": ["ab" * (1 + i % 2) for i in range(count)]}


def test_features_are_those_of_the_directory(teacher: Path) -> None:
    table = sounds(3)
    task = transcription_task(directory=teacher, train=None, evaluation=table, validation=table)
    (batch,) = task.evaluation.batches()
    assert batch.keys is not None
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(teacher)
    expected = extractor(table["audio"], sampling_rate=RATE, return_tensors="np")["input_features"]
    np.testing.assert_array_equal(batch.inputs[0].numpy(), expected[batch.keys.numpy()])
    letters, row = tiny.letters(), batch.keys.tolist().index(0)
    wanted = letters("ab")["input_ids"]
    assert batch.targets[row].tolist() == [*wanted, IGNORED, IGNORED]
    assert batch.inputs[1][row].tolist()[: len(wanted)] == [0, *wanted[:-1]]


@pytest.mark.full
def test_a_whisper_is_two_files(teacher: Path, tmp_path: Path) -> None:
    table = sounds(6)
    task = transcription_task(directory=teacher, train=None, evaluation=table, validation=table, context=4)
    recipe = Recipe.loads('[[pass]]\nname = "capture"\n[[pass]]\nname = "quantize"\n[[pass]]\nname = "convert"\n')
    quick = replace(Evaluation.quick(), rehearsal=False)
    made = compress(
        encoder_decoder(teacher),
        task,
        recipe,
        out=tmp_path / "out",
        evaluation=quick,
    )
    assert made.report.parity.passed
    assert json.loads((made.folder / "preprocessor_config.json").read_text())["feature_size"] == 8
    assert isinstance(session(deployed_file(made.folder)), EncoderDecoderSession)
    with pytest.raises(InputError, match="reads sounds, which are not given as text; run its two files"):
        Continuation(made.folder)


@pytest.mark.parametrize(
    ("audio", "said"),
    [([np.zeros((2, 5))], r"row 1 has no sound of one channel, but an array \[2, 5\]"), (["a"], "row 1 has no sound")],
)
def test_what_is_no_sound_is_refused(teacher: Path, audio: list[Any], said: str) -> None:
    table = {"audio": audio, "text": ["a"]}
    with pytest.raises(InputError, match=said):
        transcription_task(directory=teacher, train=None, evaluation=table, validation=table)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"batch_size": 2.5}, "batch_size=2.5 must be a whole number"),
        ({"context": 0}, "context=0 must be a whole number, at least 1"),
        ({"max_length": 1}, "max_length=1 must be a whole number, at least 2"),
        ({"train": {"audio": [np.zeros(9)], "text": []}}, "different lengths: audio 1, text 0"),
    ],
)
def test_numbers_and_tables_are_checked(teacher: Path, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        transcription_task(
            directory=teacher, **{"train": None, "evaluation": sounds(2), "validation": sounds(2)} | wrong
        )


def test_models_of_texts_and_of_sounds_have_their_own_tasks(teacher: Path, tmp_path: Path) -> None:
    table: dict[str, list[Any]] = {"source": ["a"], "target": ["b"], "audio": [np.zeros(9)], "text": ["b"]}
    with pytest.raises(InputError, match=r"a whisper, which reads sounds and no texts; pqk\.models\.transcription"):
        seq2seq_task(directory=teacher, train=None, evaluation=table, validation=table)
    texts = tiny.directory(tmp_path / "t5", "t5")
    with pytest.raises(InputError, match=r"a t5, which reads no sounds; pqk\.models\.seq2seq takes it"):
        transcription_task(directory=texts, train=None, evaluation=table, validation=table)
