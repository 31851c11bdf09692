"""Shared by several kernels: launches, argument checks, epilogues, tile configurations."""
