"""Refusing, before anything is written, a run that cannot work: the same for YAML and Python.

Every refusal is a :class:`UsageError` (or the checkpoint's or the data set's own error) whose
message is one line: the culprit and the mend.
"""

import difflib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from torch import nn

from ...checkpoint import LoadExpectation, WSBCNCheckpointer, split_options
from ...config import UsageError, refusing
from ...data.checks import Wanted, check_sets
from ...modeling.recomputation import modules_named
from ..from_config import estimate_hooks

__all__ = ["Keys", "Setup", "check_datasets", "check_setup"]


@dataclass(frozen=True)
class Keys:
    """What the config calls the things that are checked."""

    train: str = "DATASETS.TRAIN"
    test: str = "DATASETS.TEST"
    images: str = "SOLVER.IMS_PER_BATCH"
    reference: str = "SOLVER.REFERENCE_WORLD_SIZE"
    accumulate: str = "SOLVER.ACCUMULATE"
    recompute: str = "MODEL.RECOMPUTE"
    weights: str = "MODEL.WEIGHTS"
    freeze: str = "MODEL.BACKBONE.FREEZE_AT"
    estimates: str = "MODEL.BCN"
    output_dir: str = "OUTPUT_DIR"


class Setup:
    """What is checked of a run, read off its config; one subclass for each kind of config."""

    keys = Keys()

    def __init__(self, cfg: dict):
        self.cfg = cfg

    def value(self, key: str, default: object = None) -> object:
        """What the config says under a name of ``keys``; the default where it says nothing."""

    def names(self, key: str) -> list[str]:
        """The data sets under a key, which may be a single one."""
        names = self.value(key, [])
        return [names] if isinstance(names, str) else list(names)

    def estimates(self) -> dict:
        """Keyword arguments of :func:`estimate_hooks`."""

    def model(self) -> nn.Module:
        """Build the model, or raise :class:`UsageError`."""

    def training(self, model: nn.Module) -> None:
        """Build what training alone needs."""

    def wanted(self, training: bool) -> Wanted:
        """What the data sets have to be; raises :class:`UsageError` for nonsense."""

    def expected(self, model: nn.Module) -> LoadExpectation:
        """What the weights have to be."""


def check_setup(
    setup: Setup, *, world_size: int = 1, eval_only: bool = False, resume: bool = False
) -> None:
    """Refuse a run that training or evaluation would stumble over; writes nothing.

    Checked are data sets, batch size, update rate, that the model can be built (names, norms,
    channels), which is tried on the meta device, and that the weights belong to it.

    Args:
        setup: what is to be run.
        world_size: number of processes.
        eval_only: leave out what concerns training alone.
        resume: leave out the weights if there is a checkpoint to resume from.

    Raises:
        UsageError, CheckpointError, DataError: for the first thing found.
    """
    keys = setup.keys
    train, test = [] if eval_only else setup.names(keys.train), setup.names(keys.test)
    if not (test if eval_only else train):
        raise UsageError(f"{keys.test if eval_only else keys.train} is empty: name a data set")
    check_datasets(train, keys.train)
    if not eval_only:
        _check_batch(setup, world_size)
    check_datasets(test, keys.test)
    weights = setup.value(keys.weights)
    folder = setup.value(keys.output_dir)
    resumes = resume and PathManager.exists(os.path.join(folder, "last_checkpoint"))
    if resumes:
        weights = ""
    _check_weights(weights, keys.weights)
    with refusing(f"{keys.estimates}: ", ValueError, TypeError):
        estimate_hooks(**setup.estimates())
    model = _on_meta(setup.model)
    if not eval_only:
        if not weights and not resumes:
            _check_frozen(model, keys)
        setup.training(model)
        with refusing(f"{keys.recompute}: ", ValueError):
            modules_named(model, setup.value(keys.recompute, []))
    if weights and "://" not in weights:  # others are fetched, and checked then
        WSBCNCheckpointer(model, expected=setup.expected(model)).check(weights)
    check_sets(train, test, setup.wanted(not eval_only))


def check_datasets(names: Iterable[str], key: str) -> None:
    """Refuse unknown dataset names and registered datasets whose files are absent.

    Args:
        names: of data sets.
        key: the config key they come from.

    Raises:
        UsageError: naming the dataset, where its files were looked for, and the mend.
    """
    for name in names:
        if name not in DatasetCatalog.list():
            close = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "register it first"
            raise UsageError(f"{key}: dataset {name!r} is not registered: {hint}")
        metadata = MetadataCatalog.get(name)
        if metadata.get("generator"):  # rendered on first use
            continue
        for field in ("json_file", "image_root"):
            path = metadata.get(field)
            if path and not PathManager.exists(path):
                how = metadata.get("how_to_get", "get the dataset")
                raise UsageError(
                    f"{key}: dataset {name!r} is absent: {os.path.abspath(path)} not found; {how} "
                    "and set DETECTRON2_DATASETS to the folder that holds it"
                )


def _check_batch(setup: Setup, world_size: int) -> None:
    """Refuse a batch that does not split evenly over the processes and their micro-batches."""
    keys = setup.keys
    images, reference = setup.value(keys.images), setup.value(keys.reference, 0)
    if reference:
        if images % reference:
            raise UsageError(
                f"{keys.images} {images} cannot be split over {keys.reference} {reference} "
                "processes: make it a multiple"
            )
        images = images // reference * world_size  # the images per process stay the same
    if images < 1 or images % world_size:
        raise UsageError(
            f"{keys.images} {images} cannot be split over {world_size} processes: make it a "
            f"positive multiple of {world_size}"
        )
    each, accumulate = images // world_size, setup.value(keys.accumulate, 1)
    if not 1 <= accumulate <= each:
        raise UsageError(
            f"{keys.accumulate} {accumulate} cannot split the {each} images of a process's "
            f"step: make it 1 to {each}, or {keys.images} larger"
        )


def _check_weights(weights: str, key: str) -> None:
    """Refuse the path of a checkpoint that is absent; URLs are left to the loading."""
    path, _ = split_options(weights)
    if not path or "://" in path:  # nothing to load, or resolved and checked on loading
        return
    if not PathManager.isfile(path):
        raise UsageError(
            f"{key} {path!r} not found: give the path of a checkpoint, or '' to train from scratch"
        )


def _check_frozen(model: nn.Module, keys: Keys) -> None:
    """Refuse to train on layers that stay as they were drawn at random."""
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad and p.dim() > 1]
    if frozen:
        raise UsageError(
            f"{keys.weights} '' leaves {len(frozen)} frozen layers at random values, "
            f"{frozen[0].removesuffix('.weight')!r} first: give weights, or train all, "
            f"{keys.freeze} 0"
        )


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, NotImplementedError):
        return build()  # reads numbers while it is built, as transformers do; slower
