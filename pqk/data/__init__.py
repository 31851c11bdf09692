"""What a model is fed: arrays and loaders, views of samples, data made from a teacher."""

from __future__ import annotations

from pqk.data.data import ArrayData, Augment, Batch, Data, LoaderData, digest_of
from pqk.data.structures import Inputs
from pqk.data.synthesis import Prior, pseudo_labels, synthesize
from pqk.data.views import Take, Views

__all__ = [
    "ArrayData",
    "Augment",
    "Batch",
    "Data",
    "Inputs",
    "LoaderData",
    "Prior",
    "Take",
    "Views",
    "digest_of",
    "pseudo_labels",
    "synthesize",
]
