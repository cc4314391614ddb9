"""From classification records to model inputs, and the names of the data sets."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import (
    DatasetFromList,
    MapDataset,
    MetadataCatalog,
    get_detection_dataset_dicts,
)
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import InferenceSampler

from ..names import is_free
from ..shapes import default_root, register_shapes_crops
from .augmentation import CenterCrop, PadAndCrop, RandomResizedCrop
from .sources import register_cifar, register_image_folder

__all__ = [
    "ClassificationMapper",
    "classification_mapper",
    "classification_test_loader",
    "register_classification",
]

_TEST_BATCH = 32


class ClassificationMapper:
    """Maps a classification record to what ``ImageClassifier`` takes."""

    @configurable
    def __init__(self, *, augmentations: list, image_format: str, num_classes: int):
        """
        Args:
            augmentations: Detectron2 augmentations that end in images of one size.
            image_format: ``"RGB"`` or ``"BGR"``.
            num_classes: labels are held against it.
        """
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.num_classes = num_classes

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        options = cfg.INPUT.CLASSIFICATION
        if options.SIZE < 1 or options.RESIZE_TEST < options.SIZE:
            raise ValueError(
                f"INPUT.CLASSIFICATION.RESIZE_TEST {options.RESIZE_TEST} leaves no square of "
                f"INPUT.CLASSIFICATION.SIZE {options.SIZE}: make it at least SIZE, and SIZE "
                "positive"
            )
        low, high = options.CROP_SCALE
        if not 0 < low <= high <= 1 or options.PADDING < 0:
            raise ValueError(
                f"INPUT.CLASSIFICATION: CROP_SCALE {tuple(options.CROP_SCALE)} must be two shares "
                f"of the area, 0 < smallest <= largest <= 1, and PADDING {options.PADDING} not "
                "negative"
            )
        if not is_train:
            short = options.RESIZE_TEST
            augmentations = [T.ResizeShortestEdge(short, 1 << 30), CenterCrop(options.SIZE)]
        elif options.TRAIN_CROP == "random_resized":
            augmentations = [RandomResizedCrop(options.SIZE, tuple(options.CROP_SCALE))]
        elif options.TRAIN_CROP == "pad":
            augmentations = [PadAndCrop(options.SIZE, options.PADDING)]
        else:
            raise ValueError(
                f"unknown INPUT.CLASSIFICATION.TRAIN_CROP {options.TRAIN_CROP!r}: use one of "
                "random_resized, pad"
            )
        if is_train and cfg.INPUT.RANDOM_FLIP == "horizontal":
            augmentations.append(T.RandomFlip())
        return {
            "augmentations": augmentations,
            "image_format": cfg.INPUT.FORMAT,
            "num_classes": cfg.MODEL.CLASSIFIER.NUM_CLASSES,
        }

    def __call__(self, record: dict) -> dict:
        """
        Args:
            record: ``file_name`` (and maybe ``crop_box``) or ``pixels`` (RGB), and ``label``.

        Returns:
            dict: the record with ``image``, uint8 (3, H, W), for ``pixels``.

        Raises:
            ValueError: for a label that the model has no class for.
        """
        if record["label"] >= self.num_classes:
            raise ValueError(
                f"label {record['label']} of image {record['image_id']}: set "
                f"MODEL.CLASSIFIER.NUM_CLASSES, now {self.num_classes}, to the data set's number"
            )
        image = T.AugInput(self._read(record))
        self.augmentations(image)
        chw = np.ascontiguousarray(image.image.transpose(2, 0, 1))
        rest = {key: value for key, value in record.items() if key != "pixels"}
        return {**rest, "image": torch.as_tensor(chw)}

    def _read(self, record: dict) -> np.ndarray:
        if "pixels" in record:
            image = record["pixels"]
            return image if self.image_format == "RGB" else image[:, :, ::-1]
        image = utils.read_image(record["file_name"], format=self.image_format)
        if "crop_box" in record:
            x0, y0, x1, y1 = record["crop_box"]
            image = image[y0:y1, x0:x1]
        return image


def classification_mapper(
    cfg: CfgNode, names: Iterable[str], is_train: bool
) -> ClassificationMapper | None:
    """The mapper of classification data sets, None for other data sets (Detectron2's own then).

    Args:
        cfg: the config.
        names: registered data sets.
        is_train: with the training augmentation.
    """
    kinds = {MetadataCatalog.get(name).get("evaluator_type") for name in names}
    return ClassificationMapper(cfg, is_train) if kinds == {"classification"} else None


def classification_test_loader(cfg: CfgNode, name: str) -> torch.utils.data.DataLoader | None:
    """A test loader of batches, where Detectron2's (v0.6) yields one image at a time.

    Args:
        cfg: the config.
        name: a registered data set.

    Returns:
        DataLoader over this process's share of the images; None for other data sets than
        classification's.
    """
    mapper = classification_mapper(cfg, [name], is_train=False)
    if mapper is None:
        return None
    dataset = DatasetFromList(get_detection_dataset_dicts([name], filter_empty=False), copy=False)
    return torch.utils.data.DataLoader(
        MapDataset(dataset, mapper),
        batch_size=_TEST_BATCH,
        sampler=InferenceSampler(len(dataset)),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=trivial_batch_collator,
    )


def register_classification(root: str | os.PathLike | None = None) -> None:
    """Registers ImageNet, CIFAR-10, CIFAR-100 and the view of the shapes set; reads nothing.

    Names: ``imagenet_train``, ``imagenet_val``, ``cifar10_jpg_train``, ``cifar10_jpg_val``
    (CIFAR-10 as folders of pictures), ``cifar10_train``, ``cifar10_test``,
    ``cifar100_train``, ``cifar100_test``, ``shapes_cls_train``, ``shapes_cls_val``.

    Args:
        root: folder that holds the data sets (``imagenet/train/<class>/<image>``,
            ``cifar-10-batches-bin/``, ...) and replaces what is registered under these names.
            By default ``$DETECTRON2_DATASETS`` or ``./datasets``, and names that are taken are
            left alone.
    """
    replace = root is not None
    root = default_root() if root is None else Path(root)
    for split in ("train", "val"):
        for dataset in ("imagenet", "cifar10_jpg"):
            if is_free(f"{dataset}_{split}", replace):
                register_image_folder(f"{dataset}_{split}", root / dataset / split)
        if is_free(f"shapes_cls_{split}", replace):
            register_shapes_crops(f"shapes_cls_{split}", f"shapes_{split}")
    for dataset in ("cifar10", "cifar100"):
        for split in ("train", "test"):
            if is_free(f"{dataset}_{split}", replace):
                register_cifar(f"{dataset}_{split}", root, dataset, split)
