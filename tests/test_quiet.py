"""Quiet is for a while, for those who are named, and no error is lost."""

from __future__ import annotations

import logging
import sys
import warnings

import pytest

from pqk.quiet import quiet


def noise(name: str) -> None:
    warnings.warn("a warning", stacklevel=1)  # an error in this session, where it is not dropped
    logging.getLogger(name).warning("a record")
    print("a line")
    print("a line", file=sys.stderr)


def test_warnings_are_dropped_and_the_rest_is_as_it_was(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with quiet():
        noise("some")
    assert [record.name for record in caplog.records] == ["some"]
    assert capsys.readouterr() == ("a line\n", "a line\n")
    with pytest.raises(UserWarning):
        noise("some")


def test_named_loggers_are_quiet_and_others_are_not(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("some").setLevel(logging.INFO)
    with quiet("some", level=logging.ERROR, printing=True):
        noise("some.part")
        noise("other")
        logging.getLogger("some").error("an error")
    assert [record.getMessage() for record in caplog.records] == ["a record", "an error"]
    assert logging.getLogger("some").level == logging.INFO
    logging.getLogger("some").setLevel(logging.NOTSET)


def test_all_loggers_are_quiet_whatever_their_level(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError), quiet(level=logging.ERROR, printing=True):
        logging.getLogger("some").setLevel(logging.DEBUG)  # as libraries do when they are imported
        noise("some")
        logging.getLogger("some").error("an error")
        raise ValueError
    logging.getLogger("some").setLevel(logging.NOTSET)
    assert [record.getMessage() for record in caplog.records] == ["an error"]
    assert capsys.readouterr() == ("", "") and logging.root.manager.disable == logging.NOTSET
