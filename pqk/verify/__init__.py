"""Whether the deployed file computes what was trained: parity by layer and end to end, integer coverage."""
