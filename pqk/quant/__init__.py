"""Integer grids: the arithmetic of scales and rounding, and its simulation in training."""
