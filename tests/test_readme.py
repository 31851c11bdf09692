"""The README quotes the committed results and recipes, and nothing else."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_readme_is_what_its_sources_say() -> None:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "tests" / "tools" / "readme.py")
    assert spec is not None and spec.loader is not None
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    text = (ROOT / "README.md").read_text()
    assert readme.filled(text) == text, "run: python tests/tools/readme.py"


@pytest.mark.parametrize("command", ["compress", "check", "benchmark", "inspect", "passes", "schema", "doctor"])
def test_every_command_of_the_readme_exists(command: str) -> None:
    from pqk.cli.app import app

    assert re.search(rf"^pqk {command}\b", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert command in {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
