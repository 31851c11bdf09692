"""The temperature at which a classifier's probabilities are what they say."""

from __future__ import annotations

import math

from torch import Tensor


def best_temperature(logits: Tensor, labels: Tensor) -> float | None:
    """The T from 0.01 to 100 at which the NLL of logits / T is least (Guo et al. 2017, section 4.2).

    Logits [N, C] of any float dtype, labels int64 [N]. The NLL is convex in 1 / T, so its derivative there, mean_p(z) −
    z_label, has one sign on each side. None where no T is best, as all samples are right: the smaller it is, the
    smaller the NLL.
    """
    logits = logits.double()
    if bool((logits.argmax(1) == labels).all()):
        return None
    given = logits.gather(1, labels[:, None])[:, 0].mean()
    low, high = -math.log(100.0), math.log(100.0)  # of log 1 / T
    for _ in range(60):
        middle = (low + high) / 2
        expected = ((logits * math.exp(middle)).softmax(1) * logits).sum(1).mean()
        low, high = (low, middle) if float(expected) > float(given) else (middle, high)
    return math.exp(-(low + high) / 2)
