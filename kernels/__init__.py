"""Triton kernels, one op a file. Imports torch, triton and `pqk.qparams` only; works where Triton is missing."""
