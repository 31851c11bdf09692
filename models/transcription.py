"""Sounds and what is said in them as a task, for the Whisper model in a Hugging Face directory.

A source is what the directory's feature extractor makes of a sound: log-mel features float32 [M, F], all of one length
(Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", arXiv:2212.04356, section 2.2).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pqk.core.onnxruntime_session import TARGET
from pqk.data.checks import check_sizes
from pqk.data.data import ArrayData
from pqk.data.structures import Inputs
from pqk.errors import InputError
from pqk.models.encoder_decoder import SOUNDS, encoder_decoder_config, reads_sounds
from pqk.models.hub import find_directory, load_tokenizer, read_part
from pqk.models.seq2seq import SequenceEnds, target_example, target_words, task_of, teacher_forced, tensors_of
from pqk.models.text_data import Table, TextRows, check_tokens, column, filled_strings, read_table
from pqk.task.task import Task


def transcription_task(
    data: str | Path | None = None,
    *,
    directory: str | Path,
    train: Table | TextRows | None,
    evaluation: Table | TextRows,
    validation: Table | TextRows,
    audio: str = "audio",
    text: str = "text",
    batch_size: int = 8,
    max_length: int = 256,
    context: int = 16,
) -> Task:
    """Sounds with their texts for the Whisper model in a Hugging Face directory.

    Args:
        data: the folder that `directory` is looked up in, beside the current one.
        directory: the model's; its tokenizer and its preprocessor_config.json are used.
        train, evaluation, validation: `datasets` datasets or tables of columns or rows.
        audio: the column of sounds: each float [N] at the sampling rate of preprocessor_config.json.
        text: the column of what is said.
        batch_size: sounds a step.
        max_length: tokens of a text, of which longer ones lose the rest.
        context: tokens that are kept where one more is timed.

    All features are held in memory. Raises `InputError` for a directory whose model reads no sounds, for columns that
    do not fit it or each other, and for empty texts and sounds.
    """
    check_sizes("transcription", batch_size=batch_size, context=context)
    folder = find_directory(directory, None if data is None else Path(data), "transcription")
    config = encoder_decoder_config(folder)
    if not reads_sounds(config):
        raise InputError(
            f"transcription: {folder} is a {config.model_type}, which reads no sounds; pqk.models.seq2seq takes it"
        )
    tokenizer = load_tokenizer(folder, config, "transcription", least=0.9, needs_padding=False)
    extractor = read_part("AutoFeatureExtractor", folder, "transcription", "preprocessor_config.json")
    ends = SequenceEnds.of(folder, config, tokenizer, max_length)

    notes: list[str] = []

    def read(part: str, given: Table | TextRows | None) -> ArrayData | None:
        if given is None:
            return None
        table = read_table(given)
        features = _features(extractor, column(table, audio, "the table"))
        wanted = tokenizer(text_target=filled_strings(table, text, "the table"), verbose=False)["input_ids"]
        check_tokens(wanted, target_words(config), "transcription", f"the {part} data")
        notes.extend(ends.cut(wanted, f"{part} texts"))
        ids, mask, targets = teacher_forced(tensors_of([*map(ends.target, wanted)]), ends.begin, ends.pad)
        return ArrayData((features, ids, mask), targets, batch_size)

    parts = (read("training", train), read("evaluation", evaluation), read("validation", validation))
    shown = next(part for part in (parts[0], parts[2]) if part is not None)
    example = _example(shown, ends, context + 1)
    names = (*SOUNDS, *TARGET)
    return task_of(parts, example, names, f"a sound of {example[0].shape[-1]} frames", folder, ends, notes)


def _example(data: ArrayData, ends: SequenceEnds, length: int) -> Inputs:
    """The first sound twice, and `length` tokens of its text, repeated where it has less."""
    features, ids, mask = (x[:1] for x in data.inputs)
    said = ids[0, 1 : int(mask.sum())] if int(mask.sum()) > 1 else ids[0, :1]
    return features.repeat(2, 1, 1), *target_example([said] * 2, ends.begin, length)


def _features(extractor: Any, sounds: list[Any]) -> Tensor:
    """Log-mel features float32 [N, M, F] of sounds. Raises `InputError` for what is no sound, naming its row."""
    waves = []
    for row, sound in enumerate(sounds, 1):
        wave = np.asarray(sound["array"] if isinstance(sound, dict) else sound)  # `datasets` gives a dict
        if wave.ndim != 1 or not len(wave) or wave.dtype.kind not in "fiu":
            raise InputError(
                f"transcription: row {row} has no sound of one channel, but an array {[*wave.shape]} of {wave.dtype}"
            )
        waves.append(wave.astype(np.float32))
    found = extractor(waves, sampling_rate=extractor.sampling_rate, return_tensors="np")["input_features"]
    return torch.from_numpy(np.asarray(found, np.float32))
