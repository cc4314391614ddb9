"""Training and evaluation on Detectron2's engine."""

from ..config import UsageError, load_config
from .checks import check_config
from .evaluation import build_evaluator
from .hooks import EstimateSync, UpdateRateSchedule
from .monitor import ChannelMonitor
from .processes import launch
from .trainer import Trainer

__all__ = [
    "ChannelMonitor",
    "EstimateSync",
    "Trainer",
    "UpdateRateSchedule",
    "UsageError",
    "build_evaluator",
    "check_config",
    "launch",
    "load_config",
]
