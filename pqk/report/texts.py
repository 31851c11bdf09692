"""The report's part on texts that teacher and student continue, token by token."""

from __future__ import annotations

from pqk.report.base import Count, Part, Positive, Share


class ContinuedTexts(Part):
    """What teacher and student, each from its file, make of the same prompts of evaluation data, greedily."""

    texts: Count
    """prompts, each run by itself"""
    sources: bool = False
    """whether these are targets that begin with a source, which an encoder read, and not with a prompt"""
    prompt_tokens: Count
    """of a prompt at most"""
    tokens: Count
    """that were asked for behind each, at most; a text may end before"""
    alike: tuple[Count, ...]
    """for each text, the tokens before the first that differs from the teacher's; all where none does"""
    equal: Share
    """share of texts that are the teacher's"""
    as_whole: Share
    """share of the student's tokens that it chooses, too, where its text is read at once"""
    whole_difference: float
    """how far its scores then are from those step by step, at most, in shares of the largest score"""
    teacher_repeated: Share
    """share of four tokens in a row that had stood in the same text before, as student_repeated (Welleck et al. 2020,
    "Neural Text Generation with Unlikelihood Training", section 6, seq-rep-4)"""
    student_repeated: Share
    teacher_kept_bytes: Count
    """what is kept of a token for those after it"""
    student_kept_bytes: Count
    teacher_per_second: Positive | None = None
    """tokens a second after the first, median over texts; null where nothing was timed"""
    student_per_second: Positive | None = None
    teacher_first_ms: Positive | None = None
    """from a prompt to the first token, median over texts"""
    student_first_ms: Positive | None = None
    ratio: Positive | None = None
    """tokens a second of the student over the teacher's, median over texts, continued by both in turn"""
    ratio_low: Positive | None = None
    """95 % interval of the ratio (bootstrap), as ratio_high"""
    ratio_high: Positive | None = None
