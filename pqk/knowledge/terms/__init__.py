"""Distillation losses, one kind of knowledge a file."""
