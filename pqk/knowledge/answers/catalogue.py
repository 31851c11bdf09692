"""All authors of answers, and the table of a recipe that is one of them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pqk.knowledge.answers.authors import AnswerSettings, ByMixture, ByReplay, ByStudent, ByTeacher
from pqk.knowledge.answers.critic import ByCritic

AUTHORS: tuple[type[AnswerSettings], ...] = (ByTeacher, ByStudent, ByMixture, ByReplay, ByCritic)
AnyAnswers = Annotated[ByTeacher | ByStudent | ByMixture | ByReplay | ByCritic, Field(discriminator="by")]
