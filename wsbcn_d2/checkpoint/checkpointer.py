"""Detectron2's checkpointer, without the silence."""

import os
from dataclasses import replace
from urllib.parse import parse_qsl

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from ..layers import BatchChannelNorm2d
from .catalog.entries import PREFIX
from .catalog.fetching import read_entry
from .checks import LoadExpectation, check_conventions, check_coverage
from .errors import CheckpointError, NotAdmittedError, naming
from .files.containers import as_tensor, bare_names, unwrap
from .files.opening import read_file
from .files.pickles import Foreign
from .metadata import METADATA_KEY, Metadata
from .placement import place_backbone
from .saving import AtomicSaving

_OPTIONS = ("insist", "matching_heuristics")


def split_options(path: str) -> tuple[str, set[str]]:
    """Separates a path from the options after it, ``path?insist=True&matching_heuristics=True``.

    Args:
        path: of a file (whose own name may hold a "?"), a URL or a catalog name.

    Returns:
        (path, names of the options that are set).

    Raises:
        CheckpointError: an unknown option.
    """
    name, mark, query = path.rpartition("?")
    if not mark or os.path.isfile(path):
        return path, set()
    options = parse_qsl(query, keep_blank_values=True)
    unknown = [key for key, value in options if key not in _OPTIONS]
    if unknown or not options:
        raise CheckpointError(
            f"{path}: unknown query {', '.join(unknown) or query}; known are {', '.join(_OPTIONS)}"
        )
    return name, {key for key, value in options if value == "True"}


class WSBCNCheckpointer(AtomicSaving, DetectionCheckpointer):
    """A `DetectionCheckpointer` that refuses weights which would not do what they are loaded for.

    Refused, before the model is touched: weights that leave a part of the backbone untouched, with
    another kind of norm, or with another recorded WS formula; ``PATH?insist=True`` loads what fits
    of them with a warning. Different pixel statistics and a presumed formula are warned about.
    Files are read without running code from them; what it saves records the model's conventions
    under ``wsbcn_d2``.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        expected: LoadExpectation | None = None,
        **checkpointables,
    ):
        """
        Args:
            model, save_dir, save_to_disk, **checkpointables: as in ``DetectionCheckpointer``.
            expected: what the weights have to be; None reads it off the model.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.expected = expected or LoadExpectation.from_model(self.model)
        self._path = ""
        self._options: set[str] = set()

    def load(self, path: str | os.PathLike | None, *args, **kwargs) -> dict:
        """Loads from a path, URL or catalog name.

        Args:
            path: may end in options, see `split_options`; empty for nothing.

        Returns:
            dict: what the file holds besides (see fvcore).

        Raises:
            CheckpointError: see the class.
        """
        path = self._without_options(path)
        local = path and "://" not in path
        if local and not os.path.isfile(path) and comm.get_world_size() == 1:
            raise CheckpointError(f"{path}: no such file")
        if local and "?" in path:  # Detectron2 would cut it off
            return Checkpointer.load(self, path, *args, **kwargs)
        return super().load(path, *args, **kwargs)

    def check(self, path: str | os.PathLike | None) -> None:
        """Goes as far as :meth:`load` without touching the model, which may be on "meta".

        Args:
            path: as for :meth:`load`.

        Raises:
            CheckpointError: what :meth:`load` would refuse.
        """
        if path := self._without_options(path):
            self._accepted(self._load_file(self.path_manager.get_local_path(path)))

    def save(self, name: str, **kwargs) -> None:
        """As fvcore's, with the model's conventions recorded."""
        metadata = replace(self.expected, format="wsbcn_d2").as_dict()
        norms = [m for m in self.model.modules() if isinstance(m, BatchChannelNorm2d)]
        if norms:  # MODEL.BCN.NUM_GROUPS, as it turned out
            metadata["bcn_groups"] = sorted({norm.num_groups for norm in norms})
        kwargs.setdefault(METADATA_KEY, metadata)
        super().save(name, **kwargs)

    def _without_options(self, path):
        path, self._options = split_options(os.fspath(path or ""))
        self._path = path
        return path

    def _load_file(self, filename):
        if self._path.startswith(PREFIX):
            return read_entry(self._path.removeprefix(PREFIX), filename)
        content, foreign = read_file(filename)
        if foreign:
            kinds = ", ".join(foreign[:4])
            if self._resuming:
                raise NotAdmittedError(f"{filename} holds {kinds}, which are not read")
            self.logger.info(f"{filename}: objects left out: {kinds}")
        data = {k: v for k, v in content.items() if not isinstance(v, Foreign)}
        if "model" not in data:
            with naming(filename):
                state = unwrap(content).state
            data = {"model": state}
            if "conv1_w" in state:
                blobs = {k: v for k, v in state.items() if not k.endswith("_momentum")}
                data = {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}
        if "matching_heuristics" in self._options:
            data["matching_heuristics"] = True
        return data

    def _accepted(self, checkpoint):
        """The state dict to load, by the model's names; raises if it is not to be loaded."""
        model = checkpoint["model"]
        if not isinstance(model, dict) or not model:
            raise CheckpointError(f"{self._path}: holds no state dict")
        try:
            self._convert_ndarray_to_tensor(model)
            names = bare_names(list(model))
            model = {names[name]: as_tensor(name, value) for name, value in model.items()}
            recorded = checkpoint.get(METADATA_KEY)
            recorded = None if recorded is None else Metadata.from_dict(recorded)
        except (CheckpointError, ValueError, TypeError) as err:
            text = " ".join(str(err).split())[:200]
            raise CheckpointError(f"{self._path}: {text}; is it a converted checkpoint?") from err
        model = place_backbone(model, self.model.state_dict())
        insist = "insist" in self._options
        warnings = check_conventions(model, recorded, self.expected, self._path, insist)
        # Matching by name is done here, not by the parent, to see the result before it is loaded.
        if checkpoint.pop("matching_heuristics", False):
            caffe2 = checkpoint.get("__author__") == "Caffe2"
            try:
                model = align_and_update_state_dicts(self.model.state_dict(), model, caffe2)
            except (AssertionError, ValueError, IndexError) as err:
                raise CheckpointError(f"{self._path}: names that cannot be matched") from err
        found, total = check_coverage(self.model, model, self._path, warnings if insist else None)
        for line in warnings:
            self.logger.warning(line)
        self.logger.info(f"{found} of the model's {total} parameters and buffers are in the file")
        return model

    def _load_model(self, checkpoint):
        checkpoint["model"] = self._accepted(checkpoint)
        incompatible = super()._load_model(checkpoint)
        for names in (incompatible.missing_keys, incompatible.unexpected_keys):
            # A counter that frozen norms do not keep.
            names[:] = [name for name in names if not name.endswith("num_batches_tracked")]
        return incompatible
