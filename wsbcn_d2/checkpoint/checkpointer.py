"""Detectron2's checkpointer, without the silence."""

from urllib.parse import parse_qs

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts

from ..layers import BatchChannelNorm2d
from .atomic import AtomicSaving
from .errors import CheckpointError
from .metadata import METADATA_KEY, Metadata
from .placement import place_backbone
from .reader import read_file, unwrap
from .verify import LoadExpectation, check_conventions, check_coverage


class WSBCNCheckpointer(AtomicSaving, DetectionCheckpointer):
    """A `DetectionCheckpointer` that refuses weights which would not do what they are loaded for.

    Refused, before the model is touched: weights that leave a part of the backbone untouched, with
    another kind of norm, or with another recorded WS formula. Different pixel statistics are
    warned about. Files are read without running code from them; what it saves records the model's
    conventions under ``wsbcn_d2``.
    """

    def __init__(
        self,
        model,
        save_dir="",
        *,
        save_to_disk=None,
        expected: LoadExpectation | None = None,
        **checkpointables,
    ):
        """
        Args:
            model: a detector, or it wrapped in DDP.
            save_dir, save_to_disk, **checkpointables: as in ``DetectionCheckpointer``.
            expected: what the weights have to be; None reads it off the model.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.expected = expected or LoadExpectation.from_model(self.model)
        self._path = ""
        self._heuristics = False

    def load(self, path, *args, **kwargs):
        """Loads from a path, URL or catalog name.

        Args:
            path: may end in ``?matching_heuristics=True``; empty for nothing.

        Returns:
            dict: what the file holds besides (see fvcore).

        Raises:
            CheckpointError: see the class.
        """
        return super().load(self._without_query(path), *args, **kwargs)

    def check(self, path):
        """Goes as far as :meth:`load` without touching the model, which may be on "meta".

        Args:
            path: as for :meth:`load`.

        Raises:
            CheckpointError: what :meth:`load` would refuse.
        """
        if path := self._without_query(path):
            self._accepted(self._load_file(self.path_manager.get_local_path(path)))

    def save(self, name, **kwargs):
        """As fvcore's, with the model's conventions recorded."""
        metadata = self.expected.metadata().as_dict()
        norms = [m for m in self.model.modules() if isinstance(m, BatchChannelNorm2d)]
        if norms:  # MODEL.BCN.NUM_GROUPS, as it turned out
            metadata["bcn_groups"] = sorted({norm.num_groups for norm in norms})
        kwargs.setdefault(METADATA_KEY, metadata)
        super().save(name, **kwargs)

    def _load_file(self, filename):
        data = read_file(filename)
        if filename.endswith(".pyth"):  # pycls; as Detectron2, but without its unpickling
            state = data.get("model_state")
            if not isinstance(state, dict):
                raise CheckpointError(f"{filename}: pycls checkpoints have a 'model_state'")
            state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
            return {"model": state, "__author__": "pycls", "matching_heuristics": True}
        if "model" not in data and not filename.endswith(".pkl"):
            data = {"model": unwrap(data).state if "state_dict" in data else data}
        elif filename.endswith(".pkl") and not ("model" in data and "__author__" in data):
            blobs = data.get("blobs", data)
            data = {
                "model": {k: v for k, v in blobs.items() if not k.endswith("_momentum")},
                "__author__": "Caffe2",
                "matching_heuristics": True,
            }
        if self._heuristics:
            data["matching_heuristics"] = True
        return data

    def _without_query(self, path):
        self._path = path = str(path or "")
        path, mark, query = path.partition("?")
        query = parse_qs(query) if mark else {}
        self._heuristics = query.pop("matching_heuristics", ["False"]) == ["True"]
        if query:
            raise CheckpointError(f"{self._path}: unknown query {', '.join(query)}")
        return path

    def _accepted(self, checkpoint):
        """The state dict to load, by the model's names; raises if it is not to be loaded."""
        model = checkpoint["model"]
        if not isinstance(model, dict) or not model:
            raise CheckpointError(f"{self._path}: holds no state dict")
        try:
            self._convert_ndarray_to_tensor(model)
        except ValueError as err:
            raise CheckpointError(f"{self._path}: {err}; is it a converted checkpoint?") from err
        if any(name.startswith("module.") for name in model):
            model = {name.removeprefix("module."): value for name, value in model.items()}
        model = place_backbone(model, self.model.state_dict())
        recorded = checkpoint.get(METADATA_KEY)
        recorded = None if recorded is None else Metadata.from_dict(recorded)
        for line in check_conventions(model, recorded, self.expected, self._path):
            self.logger.warning(line)
        # Matching by name is done here, not by the parent, to see the result before it is loaded.
        if checkpoint.pop("matching_heuristics", False):
            model = align_and_update_state_dicts(
                self.model.state_dict(),
                model,
                c2_conversion=checkpoint.get("__author__") == "Caffe2",
            )
        found, total = check_coverage(self.model, model, self._path)
        self.logger.info(f"{found} of the model's {total} parameters and buffers are in the file")
        return model

    def _load_model(self, checkpoint):
        checkpoint["model"] = self._accepted(checkpoint)
        incompatible = super()._load_model(checkpoint)
        for names in (incompatible.missing_keys, incompatible.unexpected_keys):
            # A counter that frozen norms do not keep.
            names[:] = [name for name in names if not name.endswith("num_batches_tracked")]
        return incompatible
