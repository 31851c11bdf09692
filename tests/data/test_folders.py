"""Where data lives: what the user says first, and the default last."""

from __future__ import annotations

from pathlib import Path

import pytest

from pqk.data.folders import DEFAULT, VARIABLE, data_folder, data_folders


def test_an_argument_goes_before_the_environment_and_that_before_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "env")
    assert data_folders("own") == [Path("own"), Path("env"), Path(DEFAULT)]
    assert data_folder() == Path("env")
    monkeypatch.delenv(VARIABLE)
    assert data_folders() == [Path(DEFAULT)] and data_folder(Path("own")) == Path("own")
