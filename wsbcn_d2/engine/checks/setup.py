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
from ...config import UsageError, one_line
from ...modeling.recomputation import modules_named
from ..from_config import estimate_hooks

__all__ = ["Keys", "Setup", "check_datasets", "check_setup"]


@dataclass(frozen=True)
class Keys:
    """What the config calls the things that are checked, for messages."""

    train: str = "DATASETS.TRAIN"
    test: str = "DATASETS.TEST"
    images: str = "SOLVER.IMS_PER_BATCH"
    reference: str = "SOLVER.REFERENCE_WORLD_SIZE"
    accumulate: str = "SOLVER.ACCUMULATE"
    recompute: str = "MODEL.RECOMPUTE"
    weights: str = "MODEL.WEIGHTS"
    freeze: str = "MODEL.BACKBONE.FREEZE_AT"
    estimates: str = "MODEL.BCN"


@dataclass(frozen=True)
class Setup:
    """What is checked of a run, read off its config.

    Attributes:
        keys: names in messages.
        train, test: names of the data sets.
        images: per step, over all processes.
        reference: number of processes that ``images`` is meant for; 0 for any.
        accumulate: micro-batches that a process's images are split into.
        recompute: patterns of modules to recompute in backward.
        weights: path, URL or "".
        output_dir: where a checkpoint to resume from would be.
        estimates: keyword arguments of :func:`estimate_hooks`.
        model: builds the model, or raises :class:`UsageError`.
        training: is given the model and builds what training alone needs.
        data: looks at the data sets; is told whether there is training.
        expected: is given the model and says what the weights have to be.
    """

    keys: Keys
    train: Iterable[str]
    test: Iterable[str]
    images: int
    reference: int
    accumulate: int
    recompute: Iterable[str]
    weights: str
    output_dir: str
    estimates: dict
    model: Callable[[], nn.Module]
    training: Callable[[nn.Module], object]
    data: Callable[[bool], object]
    expected: Callable[[nn.Module], LoadExpectation]


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
    wanted = (setup.test, keys.test) if eval_only else (setup.train, keys.train)
    if not wanted[0]:
        raise UsageError(f"{wanted[1]} is empty: name a data set")
    if not eval_only:
        check_datasets(setup.train, keys.train)
        _check_batch(setup, world_size)
    check_datasets(setup.test, keys.test)
    weights = setup.weights
    resumes = resume and PathManager.exists(os.path.join(setup.output_dir, "last_checkpoint"))
    if resumes:
        weights = ""
    _check_weights(weights, keys.weights)
    try:
        estimate_hooks(**setup.estimates)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{keys.estimates}: {one_line(error)}") from error
    model = _on_meta(setup.model)
    if not eval_only:
        if not weights and not resumes:
            _check_frozen(model, keys)
        setup.training(model)
        try:
            modules_named(model, setup.recompute)
        except ValueError as error:
            raise UsageError(f"{keys.recompute}: {one_line(error)}") from error
    if weights and "://" not in weights:  # others are fetched, and checked then
        WSBCNCheckpointer(model, expected=setup.expected(model)).check(weights)
    setup.data(not eval_only)


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
    keys, images = setup.keys, setup.images
    if setup.reference:
        if images % setup.reference:
            raise UsageError(
                f"{keys.images} {images} cannot be split over {keys.reference} {setup.reference} "
                "processes: make it a multiple"
            )
        images = images // setup.reference * world_size  # the images per process stay the same
    if images < 1 or images % world_size:
        raise UsageError(
            f"{keys.images} {images} cannot be split over {world_size} processes: make it a "
            f"positive multiple of {world_size}"
        )
    each = images // world_size
    if not 1 <= setup.accumulate <= each:
        raise UsageError(
            f"{keys.accumulate} {setup.accumulate} cannot split the {each} images of a process's "
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
