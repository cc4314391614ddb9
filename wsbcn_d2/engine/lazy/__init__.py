"""Python configs (LazyConfig): reading, checking before a run, training."""

from .checking import check_lazy_config
from .reading import load_lazy_config
from .training import auto_scale, evaluate, train, train_net

__all__ = [
    "auto_scale",
    "check_lazy_config",
    "evaluate",
    "load_lazy_config",
    "train",
    "train_net",
]
