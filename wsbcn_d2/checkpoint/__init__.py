"""Pretrained checkpoints: convert, fetch, verify. See the functions' own documentation."""

from .catalog.entries import CATALOG
from .catalog.fetching import fetch, register
from .checkpointer import WSBCNCheckpointer, split_options
from .checks import LoadExpectation
from .conversion import TARGETS, Options, convert, convert_file, write_checkpoint
from .errors import CheckpointError
from .files.containers import read_checkpoint
from .formats.imagenet import convert_imagenet
from .formats.plain_bn import batch_norm_to_bcn
from .formats.recognise import FORMATS, detect_format
from .metadata import METADATA_KEY, Metadata
from .report import ConversionReport

__all__ = [
    "CATALOG",
    "FORMATS",
    "METADATA_KEY",
    "TARGETS",
    "CheckpointError",
    "ConversionReport",
    "LoadExpectation",
    "Metadata",
    "Options",
    "WSBCNCheckpointer",
    "batch_norm_to_bcn",
    "convert",
    "convert_file",
    "convert_imagenet",
    "detect_format",
    "fetch",
    "read_checkpoint",
    "split_options",
    "write_checkpoint",
]

register()  # wsbcn:// names
