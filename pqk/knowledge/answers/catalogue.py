"""All authors of answers, and the table of a recipe that is one of them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pqk.knowledge.answers.adversary import ByAdversary
from pqk.knowledge.answers.authors import AnswerSettings, ByCorrection, ByMixture, ByStudent, ByTeacher
from pqk.knowledge.answers.critic import ByCritic
from pqk.knowledge.answers.replay import ByReplay

AUTHORS: tuple[type[AnswerSettings], ...] = (
    ByTeacher, ByStudent, ByMixture, ByCorrection, ByReplay, ByCritic, ByAdversary,
)  # fmt: skip
AnyAnswers = Annotated[
    ByTeacher | ByStudent | ByMixture | ByCorrection | ByReplay | ByCritic | ByAdversary, Field(discriminator="by")
]
