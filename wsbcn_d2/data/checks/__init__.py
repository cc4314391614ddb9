"""A data set in COCO format is looked at before a model is trained on it.

``annotations`` and ``masks`` look at the JSON, ``pictures`` at the pictures, ``fit`` holds what was
found against the config, ``memory`` keeps what was found good.
"""

from .findings import Fault, Findings
from .fit import Wanted, check_sets
from .look import look_at
from .summary import summarize

__all__ = ["Fault", "Findings", "Wanted", "check_sets", "look_at", "summarize"]
