"""Training and evaluation on Detectron2's engine."""

from .config import UsageError, check_config, load_config
from .evaluation import build_evaluator
from .hooks import EstimateSync, UpdateRateSchedule
from .launch import launch
from .monitor import ChannelMonitor
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
