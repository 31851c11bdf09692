"""Where the student will run, and where this process runs now."""

from __future__ import annotations

from pqk.target.target import ISA_ORDER, S7_SYMMETRIC, S8, S8_SYMMETRIC, TARGETS, Target, cpu_flags, machine_target

__all__ = ["ISA_ORDER", "S7_SYMMETRIC", "S8", "S8_SYMMETRIC", "TARGETS", "Target", "cpu_flags", "machine_target"]
