"""Pretrained checkpoints: convert, fetch, verify. See the functions' own documentation."""

from .catalog import CATALOG
from .checkpointer import WSBCNCheckpointer
from .convert import TARGETS, Options, convert, convert_file
from .errors import CheckpointError
from .fetch import fetch, register
from .formats import FORMATS, detect_format
from .imagenet import convert_imagenet, to_authors_names
from .metadata import METADATA_KEY, Metadata
from .plain_bn import batch_norm_to_bcn
from .reader import read_checkpoint
from .report import ConversionReport
from .verify import LoadExpectation
from .writer import write_checkpoint

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
    "to_authors_names",
    "write_checkpoint",
]

register()  # wsbcn:// names
