"""Whether an ONNX file answers a batch of none by none.

It is tried in a process of its own, as there are operators of ONNX Runtime that end theirs on it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

PATIENCE = 120.0
"""seconds; a file that takes longer for nothing does not take it"""


def takes_no_samples(path: Path, inputs: dict[str, tuple[list[int], str]], outputs: list[list[int]]) -> bool:
    """Runs a file on inputs that hold nothing.

    Args:
        path: the file.
        inputs: by name the shape, of which the batch is 0, and the dtype.
        outputs: the shapes that the outputs should have, in order.

    Returns:
        Whether they have; False, too, where the file fails or its process ends.
    """
    request = json.dumps({"path": str(path), "inputs": inputs, "outputs": outputs})
    command = [sys.executable, "-P", "-m", __name__]
    try:
        return not subprocess.run(command, input=request, text=True, capture_output=True, timeout=PATIENCE).returncode
    except subprocess.TimeoutExpired:
        return False


def run(request: Any) -> None:
    """The other end. Raises `ValueError` for other shapes, and what ONNX Runtime raises."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(request["path"], options, providers=["CPUExecutionProvider"])
    feeds = {name: np.zeros(shape, dtype) for name, (shape, dtype) in request["inputs"].items()}
    shapes = [list(x.shape) for x in session.run(None, feeds)]
    if shapes != request["outputs"]:
        raise ValueError(f"outputs are {shapes}, not {request['outputs']}")


if __name__ == "__main__":
    run(json.load(sys.stdin))
