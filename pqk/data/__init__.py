"""What a model is fed: arrays and loaders, views of samples, data made from a teacher."""

from __future__ import annotations

from pqk.data.data import (
    ArrayData,
    Augment,
    Batch,
    Data,
    Inputs,
    LoaderData,
    Take,
    TeachersView,
    TwoViews,
    View,
    Views,
    as_data,
    digest_of,
    map_tensors,
    split,
)

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
    "View",
    "Views",
    "as_data",
    "digest_of",
    "map_tensors",
    "split",
]
