"""`pqk generate`: a text continued by an artifact, shown as it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pqk.cli.console import CommandAnswer, speaks, terminal, write_piece
from pqk.generation.continuation import Continuation, Pace, Sampling

STOPPED = {"end": "; the text ended", "positions": "; it stopped at the model's last position"}
"""what is said beside the pace of a text that stopped before it had all tokens that were asked for"""


def generate(
    folder: Path, prompt: str, sampling: Sampling, *, chat: bool, threads: int, as_json: bool
) -> CommandAnswer:
    """Continues a prompt: the text goes to stdout piece by piece, and what it took to stderr."""
    model, pieces = Continuation(folder, threads), []
    shown = speaks() and not as_json
    for piece in model.stream(prompt, sampling, chat=chat):
        pieces.append(piece)
        if shown:
            write_piece(piece if len(pieces) > 1 or chat or model.seq2seq else prompt + piece)
    if shown:
        write_piece("\n")
        terminal(stderr=True).print(pace_text(model.pace), highlight=False)
        if left_out := model.limits.left_out:
            terminal(stderr=True).print(left_out_text(left_out), highlight=False)
    found = {"text": "".join(pieces), **asdict(model.pace), "left_out": model.limits.left_out}
    return CommandAnswer(found, [])


def left_out_text(left_out: Sequence[str]) -> str:
    """What the model's configuration says of how tokens are chosen, and is not done."""
    return f"generation_config.json says {', '.join(left_out)}, which transformers does and this does not"


def pace_text(pace: Pace) -> str:
    """What a text took, in one line."""
    return (
        f"{pace.tokens} tokens after a prompt of {pace.prompt}: the first after {pace.first_ms:.3g} ms, "
        f"then {pace.per_second:.4g} tokens a second{STOPPED.get(pace.stopped or '', '')}"
    )
