"""Handwritten digits as a task that ships inside scikit-learn, and the small teacher of `make demo`.

1,797 grey 8x8 images of 0 to 9 (Alpaydin and Kaynak 1998, UCI "Optical Recognition of Handwritten Digits"), enlarged
to 32x32 with three equal channels, so that the CIFAR ResNet is the network. The teacher's weights lie beside this file;
`python -m pqk.models.digits` trains them again.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk.data.data import ArrayData
from pqk.errors import InputError
from pqk.models.images import CropFlip, Normalize
from pqk.models.resnet import ResNet, resnet
from pqk.task.task import Task

MEAN, STD = (0.25, 0.25, 0.25), (0.3, 0.3, 0.3)
WEIGHTS = Path(__file__).with_name("digits_teacher.safetensors")

log = logging.getLogger(__name__)


@cache
def load_digits() -> tuple[Tensor, Tensor]:
    """(images uint8 [1797, 3, 32, 32], labels int64 [1797]), shuffled once and for all.

    Raises `InputError` where scikit-learn is not installed or its file cannot be read.
    """
    # The file alone: importing scikit-learn takes a second.
    package = importlib.util.find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise InputError("digits: the images are in scikit-learn, which is not installed: pip install 'pqk[demo]'")
    path = Path(package.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    try:
        rows = np.loadtxt(path, delimiter=",")
    except (OSError, ValueError) as error:
        raise InputError(f"digits: {path} cannot be read ({error}); install scikit-learn anew") from error
    raw, labels = rows[:, :-1], rows[:, -1]
    grey = torch.from_numpy(raw).float().view(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(grey, size=(32, 32), mode="bilinear", align_corners=False).round().to(torch.uint8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order].expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(labels).long()[order]


def digits_task(
    data: str | Path | None = None,
    *,
    batch_size: int = 64,
    views: int | None = 4,
    validation: int = 200,
    evaluation: int = 400,
    limit: int | None = None,
) -> Task:
    """The digits with random shifts of up to 4 pixels (a mirrored digit is another digit: no flips).

    Args:
        data: not used, the images are in a package; every task factory is called with it.
        batch_size: images a step.
        views: distinct shifted views of an image, so that the teacher's answers are cached; None: unbounded.
        validation, evaluation: images that are held out of train.
        limit: use only the first images of train.
    """
    images, labels = load_digits()
    held = validation + evaluation
    if validation < 1 or evaluation < 2 or held >= len(images):
        raise InputError(
            f"digits: validation={validation} and evaluation={evaluation} must leave some of the {len(images)} images "
            "for train, and hold at least 1 and 2"
        )
    shift, normalize = CropFlip(len(images), flip=False), Normalize(MEAN, STD)
    whole = ArrayData(images, labels, batch_size, augment=shift, views=views, prepare=normalize)
    train_end = len(images) if limit is None else min(len(images), held + limit)
    return Task(
        train=whole.subset(torch.arange(held, train_end), augmented=True),
        validation=whole.subset(torch.arange(evaluation, held), augmented=False),
        evaluation=whole.subset(torch.arange(evaluation), augmented=False),
        input_names=("input",),
        output_names=("logits",),
        preprocessing={
            "layout": "NCHW, grey in 3 channels",
            "scale": "x / 255, then (x - mean) / std",
            "mean": MEAN,
            "std": STD,
        },
    )


def digits_resnet() -> ResNet:
    """ResNet-20: 3 blocks a stage of 16, 32 and 64 channels; 269,722 parameters, 41 MMAC."""
    return resnet((3, 3, 3))


def train_teacher(task: Task, epochs: int = 15, peak: float = 0.1, seed: int = 0) -> nn.Module:
    """The teacher, trained from scratch on the labels with SGD and a one-cycle rate, in eval mode."""
    torch.manual_seed(seed)
    model, data = digits_resnet(), task.need_train("digits")
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=peak, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, epochs * len(data))
    for epoch in range(epochs):
        total = 0.0
        for batch in data.batches(seed + epoch, epoch):
            loss = F.cross_entropy(model.train()(*batch.inputs), batch.targets, label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        score = task.score(model.eval(), task.validation)
        log.info("epoch %d of %d: loss %.3f, validation %.4f", epoch + 1, epochs, total / len(data), score)
    return model.eval()


def main() -> None:
    """Train the teacher and write its weights beside this file."""
    from safetensors.torch import save_file

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    task = digits_task(views=None)
    teacher = train_teacher(task)
    save_file({k: v.contiguous() for k, v in teacher.state_dict().items()}, WEIGHTS)
    log.info("%s: evaluation %.4f", WEIGHTS, task.score(teacher, task.evaluation))


if __name__ == "__main__":
    main()
