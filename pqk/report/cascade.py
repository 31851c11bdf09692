"""The report's part on a cascade: a student that answers what it is sure of, and its teacher for the rest."""

from __future__ import annotations

from pydantic import Field

from pqk.report.base import Count, Part, Positive, Share


class CascadeResult(Part):
    """What a cascade does on evaluation data, at batch 1."""

    temperature: Positive
    """of the student's logits, fitted on validation data"""
    threshold: float = Field(ge=0, le=1)
    """the least probability of a class at which the student's answer is taken"""
    routed_validation: Share
    """share of validation samples that the teacher answered"""
    routed: Share
    """share of evaluation samples that the teacher answers"""
    metric: float | None
    """of the whole; null where evaluation data has no labels"""
    student_metric: float | None
    """of the student's own answers to all samples"""
    teacher_metric: float | None
    mean_ms: Positive | None = None
    """the student's time, and the teacher's for the share that is routed; null where nothing was timed"""
    p95_ms: Positive | None = None
    """over the timed samples with their mix, as p99_ms"""
    p99_ms: Positive | None = None
    student_ms: Positive | None = None
    """median of the student alone, as teacher_ms of the teacher in FP32"""
    teacher_ms: Positive | None = None
    ratio: Positive | None = None
    """the teacher's time over the mean"""
    timed_samples: Count = 0
    size_bytes: Count
    """of both files"""
