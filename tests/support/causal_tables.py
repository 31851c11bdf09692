"""The table of the families of causal models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from families import footnoted

from pqk.files import read_json

RESULTS = Path(__file__).parents[2] / "models" / "results" / "causal_families.json"
FORMS = {"dynamic": "dynamic", "static": "static", "blockwise": "blocks"}
"""how activations are quantized -> what a header calls it"""
PARTS = {"heads": "groups of heads", "units": "hidden units", "width": "residual width", "layers": "layers"}
COLUMNS = (
    PARTS
    | {f"{form} parity": f"{name}: parity" for form, name in FORMS.items()}
    | {f"{form} integer": f"{name}: integer products" for form, name in FORMS.items()}
)
"""what a family's row says -> its header"""


def joined() -> dict[str, dict[str, Any]]:
    """The committed results, a row a family."""
    found: dict[str, dict[str, Any]] = read_json(RESULTS)
    rows = {}
    for family in (name for name in found if " " not in name):
        forms = {form: found[f"{family} {form}"] for form in FORMS}
        more = {f"{form} {key}": row[key] for form, row in forms.items() for key in ("parity", "integer")}
        rows[family] = found[family] | more
    return rows


def families_table() -> str:
    """The committed results as Markdown."""
    return footnoted(joined(), COLUMNS)
