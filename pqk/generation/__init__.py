"""Texts continued by an artifact: prompts in, pieces of text out."""
