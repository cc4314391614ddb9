"""One picture in, predictions out: Detectron2's predictor with this project's checks; drawing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from detectron2.config import CfgNode, instantiate
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.engine import DefaultPredictor
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from .checkpoint import CheckpointError, LoadExpectation, WSBCNCheckpointer, split_options
from .config import WRONG_MODEL, UsageError, load_config, one_line, refusing
from .data.picture_range import read_picture
from .engine.lazy import load_lazy_config
from .engine.processes import is_python
from .folding import fold as folded
from .safe_yaml import read_yaml

if TYPE_CHECKING:  # its import needs OpenCV, prediction does not
    from detectron2.utils.visualizer import VisImage

__all__ = ["Predictor", "draw_predictions"]


class Predictor(DefaultPredictor):
    """Detectron2's ``DefaultPredictor``, whose weights are read and checked as in training.

    Files are read without running code from them, weights that do not fit the model are refused,
    and Python configs (LazyConfig) are taken too.

    Attributes:
        cfg: the config.
        model: in evaluation mode; folded if asked for.
        metadata: of the first test set, with names and ids of the classes where they are known.
        picture_range: values that become black and white in pictures of more than 8 bits.

    Example::

        predictor = wsbcn_d2.Predictor.from_checkpoint("output/demo/model_final.pth")
        instances = predictor(cv2.imread("picture.jpg"))["instances"]
    """

    def __init__(self, cfg: CfgNode | DictConfig, *, fold: bool = False):
        """
        Args:
            cfg: its ``MODEL.WEIGHTS`` (``train.init_checkpoint``) is the model.
            fold: predict with :func:`wsbcn_d2.fold` of it, which is the same to 1e-5 and faster.

        Raises:
            CheckpointError: for weights that cannot be read or do not fit.
        """
        if isinstance(cfg, CfgNode):
            # The parent's own loading would unpickle a foreign file, and take what does not fit.
            unloaded = cfg.clone()
            unloaded.defrost()
            unloaded.MODEL.WEIGHTS = ""
            if cfg.INPUT.FORMAT == "L":  # which the parent does not take
                unloaded.INPUT.FORMAT = "BGR"
            super().__init__(unloaded)
            self.picture_range = cfg.INPUT.PICTURE_RANGE
            weights, expected = cfg.MODEL.WEIGHTS, LoadExpectation.from_model(self.model, cfg)
            self.cfg = cfg.clone()
        else:
            self._init_lazy(cfg)
            weights, expected = cfg.train.init_checkpoint, None
        WSBCNCheckpointer(self.model, expected=expected).load(weights)
        if fold:
            self.model = folded(self.model)
        self.metadata = getattr(self, "metadata", Metadata(name="none"))
        _know_classes(self.metadata)

    def _init_lazy(self, cfg: DictConfig) -> None:
        self.cfg = cfg.copy()
        self.model = instantiate(cfg.model).to(cfg.train.device).eval()
        names = OmegaConf.select(cfg, "dataloader.test.dataset.names", default=[])
        for name in [names] if isinstance(names, str) else names[:1]:
            self.metadata = MetadataCatalog.get(name)
        mapper = cfg.dataloader.test.mapper
        self.picture_range = list(mapper.get("limits", []))
        mapper = mapper.get("mapper", mapper)  # of a RangeMapper
        self.input_format = mapper.image_format
        self.aug = _Sequence(instantiate(list(mapper.augmentations)))

    @classmethod
    def from_checkpoint(
        cls,
        weights: str | os.PathLike,
        *,
        config_file: str | os.PathLike | None = None,
        opts: Iterable[str] = (),
        threshold: float | None = None,
        fold: bool = False,
    ) -> Predictor:
        """A predictor of a trained model.

        Args:
            weights: its checkpoint.
            config_file: its config; the ``config.yaml`` that training left beside the checkpoint by
                default. A Python config has to be named here: it is code, which is run.
            opts: overrides, ``KEY VALUE KEY VALUE ...`` (of a Python config ``key=value``).
            threshold: score below which nothing is predicted; the config's by default.
            fold: see the constructor.

        Raises:
            UsageError, CheckpointError: one line that names the culprit and the mend.
        """
        path = os.fspath(weights)
        file, _ = split_options(path)
        if "://" not in file and not os.path.isfile(file):
            raise UsageError(f"checkpoint {file!r} not found: check its path")
        config_file = _config_beside(file) if config_file is None else os.fspath(config_file)
        if is_python(config_file):
            cfg = load_lazy_config(config_file, [*opts, f"train.init_checkpoint={path!r}"])
        else:
            cfg = load_config(config_file, [*opts, "MODEL.WEIGHTS", path])
        try:
            predictor = cls(cfg, fold=fold)
        except (UsageError, CheckpointError):
            raise
        except WRONG_MODEL as error:
            raise UsageError(f"the model cannot be built: {one_line(error)}") from error
        if threshold is not None:
            for module in predictor.model.modules():
                for name in ("test_score_thresh", "combine_instances_score_thresh"):
                    if hasattr(module, name):
                        setattr(module, name, threshold)
        return predictor

    def read(self, path: str | os.PathLike) -> np.ndarray:
        """A picture as the model was trained on them, turned as its EXIF says.

        Args:
            path: one of more than 8 bits needs ``INPUT.PICTURE_RANGE``.

        Returns:
            uint8 array (H, W, 3), BGR.

        Raises:
            DataError: for such a picture without a range.
        """
        return read_picture(os.fspath(path), "BGR", self.picture_range)

    def __call__(self, original_image: np.ndarray) -> dict:
        """Predict.

        Args:
            original_image: shape (H, W, 3), BGR, 0 to 255.

        Returns:
            dict: the model's output for one image, by task: ``instances``
            (:class:`detectron2.structures.Instances`), ``sem_seg``, ``panoptic_seg``.

        Raises:
            ValueError: for an array of another shape.
        """
        if original_image.ndim != 3 or original_image.shape[2] != 3 or not original_image.size:
            raise ValueError(
                f"a picture has shape (height, width, 3), not {tuple(original_image.shape)}"
            )
        if isinstance(self.cfg, CfgNode) and self.cfg.INPUT.FORMAT == "L":
            grey = Image.fromarray(original_image[:, :, ::-1]).convert("L")
            original_image = np.asarray(grey)[:, :, None]
        return super().__call__(original_image)

    def draw(self, image: np.ndarray, predictions: dict, *, scale: float = 1.0) -> VisImage:
        """Draw what was predicted.

        Args:
            image: as given to the predictor.
            predictions: as returned by it.
            scale: enlargement of the picture.

        Returns:
            VisImage: ``get_image()`` is an array (H, W, 3), RGB; ``save(path)`` writes it.
        """
        from detectron2.utils.visualizer import Visualizer

        visualizer = Visualizer(image[:, :, ::-1], self.metadata, scale=scale)
        drawn = visualizer.output
        if "panoptic_seg" in predictions:
            segments, info = predictions["panoptic_seg"]
            return visualizer.draw_panoptic_seg_predictions(segments.to("cpu"), info)
        if "sem_seg" in predictions:
            classes = predictions["sem_seg"].argmax(dim=0).to("cpu")
            drawn = visualizer.draw_sem_seg(classes)
        if "instances" in predictions:
            drawn = visualizer.draw_instance_predictions(predictions["instances"].to("cpu"))
        return drawn


def _know_classes(metadata: Metadata) -> None:
    """Add the names and ids of the classes, which Detectron2 reads with the set's annotations."""
    path = metadata.get("json_file") or ""
    if hasattr(metadata, "thing_dataset_id_to_contiguous_id") or not os.path.isfile(path):
        return
    categories = json.loads(Path(path).read_text())["categories"]
    categories = {c["id"]: c["name"] for c in sorted(categories, key=lambda c: c["id"])}
    metadata.thing_dataset_id_to_contiguous_id = {id_: i for i, id_ in enumerate(categories)}
    if not hasattr(metadata, "thing_classes"):
        metadata.thing_classes = list(categories.values())


class _Sequence(T.AugmentationList):
    """Augmentations in order, as the parent calls a single one."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        return self(T.AugInput(image))


def _config_beside(weights: str) -> str:
    """The ``config.yaml`` of a run; of a stranger's folder too, so nothing in it may be code."""
    path = os.path.join(os.path.dirname(weights), "config.yaml")
    if "://" in weights or not os.path.isfile(path):
        raise UsageError(f"{weights!r} has no config.yaml beside it: say which with --config-file")
    with refusing("config file ", OSError, ValueError):
        content = read_yaml(path)
    if "model" in content:
        raise UsageError(
            f"{path!r} is of a Python config, which is code: if you trust it, --config-file {path}"
        )
    if "_BASE_" in content:
        raise UsageError(f"{path!r} is no whole config, it has a _BASE_: name it by --config-file")
    return path


def draw_predictions(
    cfg: CfgNode, output_dir: str, *, num_images: int = 6, min_score: float = 0.5, scale: float = 3
) -> list[str]:
    """Draw ground truth (left) and predictions (right) of evenly spaced test images.

    Args:
        cfg: its ``MODEL.WEIGHTS`` is the model, its first ``DATASETS.TEST`` the images.
        output_dir: where the PNG files go; made if absent.
        num_images: how many.
        min_score: predictions below it are not drawn.
        scale: enlargement of the picture.

    Returns:
        list[str]: the paths written.
    """
    from detectron2.utils.visualizer import Visualizer

    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    predictor = Predictor(cfg)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    picks = np.linspace(0, len(records) - 1, min(num_images, len(records))).astype(int)
    paths = []
    for record in [records[i] for i in picks]:
        image = predictor.read(record["file_name"])
        predicted = predictor(image)["instances"]
        predicted = predicted[predicted.scores >= min_score]
        truth = Visualizer(image[:, :, ::-1], predictor.metadata, scale=scale)
        truth = truth.draw_dataset_dict(record).get_image()
        found = predictor.draw(image, {"instances": predicted}, scale=scale).get_image()
        gap = np.full((truth.shape[0], 8, 3), 255, np.uint8)
        path = folder / f"{Path(record['file_name']).stem}.png"
        Image.fromarray(np.concatenate([truth, gap, found], axis=1)).save(path)
        paths.append(str(path))
    return paths
