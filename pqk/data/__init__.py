"""What a model is fed: arrays and loaders, views of samples, data made from a teacher."""

from __future__ import annotations

from pqk.data.data import ArrayData, Augment, Batch, Data, LoaderData, as_data, digest_of, split
from pqk.data.structures import Inputs, map_tensors
from pqk.data.views import Take, TeachersView, TwoViews, ViewFunction, Views

__all__ = [
    "ArrayData",
    "Augment",
    "Batch",
    "Data",
    "Inputs",
    "LoaderData",
    "Take",
    "TeachersView",
    "TwoViews",
    "ViewFunction",
    "Views",
    "as_data",
    "digest_of",
    "map_tensors",
    "split",
]
