"""Models that no recipe knows, as their owners would have written them: each with its data and a teacher of its own.

Networks are plain PyTorch, trained here from scratch for a minute or two, and handed over as `Task(train, evaluation)`
of two DataLoaders, with no validation data and nothing said of how to train. `STRANGERS` lists them; `pqk strangers`
compiles them all under the default contract.
"""

from __future__ import annotations

from pqk.models.strangers.intents import INTENTS
from pqk.models.strangers.mobile import MOBILE
from pqk.models.strangers.plain_cnn import PLAIN_CNN
from pqk.models.strangers.residual import RESIDUAL
from pqk.models.strangers.sentiment import SENTIMENT
from pqk.models.strangers.spoken import SPOKEN
from pqk.models.strangers.tabular import TABULAR
from pqk.models.strangers.unlabelled import UNLABELLED
from pqk.models.strangers.vision_transformer import VISION_TRANSFORMER

STRANGERS = (PLAIN_CNN, RESIDUAL, MOBILE, VISION_TRANSFORMER, SPOKEN, SENTIMENT, INTENTS, TABULAR, UNLABELLED)
