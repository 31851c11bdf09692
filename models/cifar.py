"""CIFAR-10 as a task for the public ResNets, from two .npz files.

The teachers have seen all 50,000 training images (99.7 % right there), so nothing is selected by accuracy on the part
held out here: it serves for calibration and for rankings by agreement with the teacher.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pqk.data.data import ArrayData
from pqk.data.folders import data_folder
from pqk.errors import InputError
from pqk.models.images import CropFlip, Normalize
from pqk.task.task import Task

# The public checkpoints were trained with ImageNet's constants, not CIFAR's.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_split(path: Path, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """(images uint8 [N, 3, 32, 32] RGB, labels int64 [N]) of a file with a lossless prediction residual.

    Raises `InputError` for a missing or unreadable file.
    """
    try:
        with np.load(path, allow_pickle=False) as z:
            residual, labels = z["residual"][:limit], z["labels"][:limit]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"cannot read {path}: {error}; point --data or PQK_DATA at the folder that has it") from error
    images = residual.cumsum(2, dtype=np.uint8).cumsum(3, dtype=np.uint8)  # wraps modulo 256, as meant
    images[:, 0] += images[:, 1]
    images[:, 2] += images[:, 1]
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def cifar10(
    data: str | Path | None = None,
    *,
    batch_size: int = 128,
    views: int | None = 8,
    validation: int = 2000,
    limit: int | None = None,
    evaluation_limit: int | None = None,
) -> Task:
    """CIFAR-10 with random crops and flips.

    Args:
        data: folder with cifar10_train.npz and cifar10_test.npz.
        batch_size: images a step.
        views: distinct augmented views of an image, so that the teacher's answers are cached; None: unbounded.
        validation: images of train that are held out.
        limit, evaluation_limit: use only the first images of train, of test.
    """
    folder, normalize = data_folder(data), Normalize(MEAN, STD)
    images, labels = load_split(folder / "cifar10_train.npz", limit)
    if not 0 < validation < len(images):
        raise InputError(f"cifar10: validation={validation} must be between 1 and {len(images) - 1} images")
    whole = ArrayData(images, labels, batch_size, augment=CropFlip(len(images)), views=views, prepare=normalize)
    test_images, test_labels = load_split(folder / "cifar10_test.npz", evaluation_limit)
    return Task(
        train=whole.subset(torch.arange(validation, len(images)), augmented=True),
        validation=whole.subset(torch.arange(validation), augmented=False),
        evaluation=ArrayData(test_images, test_labels, batch_size, prepare=normalize),
        input_names=("input",),
        output_names=("logits",),
        preprocessing={"layout": "NCHW, RGB", "scale": "x / 255, then (x - mean) / std", "mean": MEAN, "std": STD},
    )
