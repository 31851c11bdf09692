"""A latency table of this machine: what layers cost in ONNX Runtime, measured once, and networks predicted from it."""
