"""Augmentations of image classification, from Detectron2's transforms.

They follow the official ImageNet code (torchvision's ``RandomResizedCrop``; centre crop for
testing) and, for CIFAR, padding by 4 and a random crop.
"""

import numpy as np
import torch
from detectron2.data import transforms as T
from PIL import Image
from torchvision import transforms

__all__ = ["CenterCrop", "PadAndCrop", "RandomResizedCrop"]


class RandomResizedCrop(T.Augmentation):
    """Cuts out a random part of an image and resizes it to a square (Inception-style crop).

    ``size`` is the side of the result, ``scale`` the smallest and largest share of the image's
    area, ``ratio`` the smallest and largest width over height.
    """

    def __init__(
        self,
        size: int,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ):
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        # torchvision asks for an image, and looks at its size alone.
        blank = torch.empty(1, 1, 1).expand(3, height, width)
        y, x, h, w = transforms.RandomResizedCrop.get_params(blank, self.scale, self.ratio)
        return T.TransformList(
            [
                T.CropTransform(x, y, w, h, width, height),
                T.ResizeTransform(h, w, self.size, self.size, Image.BILINEAR),
            ]
        )


class PadAndCrop(T.Augmentation):
    """Pads with ``padding`` zeros on all sides, then cuts out a square at a random place."""

    def __init__(self, size: int, padding: int = 4):
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        p = self.padding
        if self.size > min(height, width) + 2 * p:
            raise ValueError(
                f"INPUT.CLASSIFICATION.SIZE {self.size} cannot be cut out of an image of "
                f"{width} x {height} pixels padded by {p}: make SIZE smaller or PADDING larger"
            )
        x = np.random.randint(width + 2 * p - self.size + 1)
        y = np.random.randint(height + 2 * p - self.size + 1)
        return T.TransformList(
            [
                T.PadTransform(p, p, p, p, width, height),
                T.CropTransform(x, y, self.size, self.size, width + 2 * p, height + 2 * p),
            ]
        )


class CenterCrop(T.Augmentation):
    """Cuts out the middle square, which is at most as large as the image."""

    def __init__(self, size: int):
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        x, y = (width - self.size) // 2, (height - self.size) // 2
        return T.CropTransform(x, y, self.size, self.size, width, height)
