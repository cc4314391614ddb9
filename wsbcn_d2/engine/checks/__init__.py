"""What is checked before a run: ``setup`` of whatever config, ``from_yaml`` reads a YAML one."""

from .from_yaml import check_config
from .setup import Keys, Setup, check_datasets, check_setup

__all__ = ["Keys", "Setup", "check_config", "check_datasets", "check_setup"]
