"""Augmentations of image classification, from Detectron2's transforms.

They follow the official ImageNet code (torchvision's ``RandomResizedCrop``; centre crop for
testing) and, for CIFAR, padding by 4 and a random crop.
"""

import numpy as np
from detectron2.data import transforms as T
from PIL import Image

__all__ = ["CenterCrop", "PadAndCrop", "RandomResizedCrop"]


class RandomResizedCrop(T.Augmentation):
    """Cuts out a random part of an image and resizes it to a square (Inception-style crop)."""

    def __init__(self, size: int, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
        """
        Args:
            size: side of the result.
            scale: smallest and largest share of the image's area.
            ratio: smallest and largest width over height.
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image):
        height, width = image.shape[:2]
        for _ in range(10):
            area = height * width * np.random.uniform(*self.scale)
            ratio = np.exp(np.random.uniform(*np.log(self.ratio)))
            w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if 0 < w <= width and 0 < h <= height:
                x, y = np.random.randint(width - w + 1), np.random.randint(height - h + 1)
                break
        else:  # the whole image, or its middle if that is too long
            w = min(width, round(height * self.ratio[1]))
            h = min(height, round(width / self.ratio[0]))
            x, y = (width - w) // 2, (height - h) // 2
        return T.TransformList(
            [
                T.CropTransform(x, y, w, h, width, height),
                T.ResizeTransform(h, w, self.size, self.size, Image.BILINEAR),
            ]
        )


class PadAndCrop(T.Augmentation):
    """Pads with zeros on all sides, then cuts out a square at a random place."""

    def __init__(self, size: int, padding: int = 4):
        """
        Args:
            size: side of the result; at most that of the padded image.
            padding: pixels on each side.
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image):
        height, width = image.shape[:2]
        p = self.padding
        x = np.random.randint(width + 2 * p - self.size + 1)
        y = np.random.randint(height + 2 * p - self.size + 1)
        return T.TransformList(
            [
                T.PadTransform(p, p, p, p, width, height),
                T.CropTransform(x, y, self.size, self.size, width + 2 * p, height + 2 * p),
            ]
        )


class CenterCrop(T.Augmentation):
    """Cuts out the middle square."""

    def __init__(self, size: int):
        """
        Args:
            size: side of the result; at most that of the image.
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image):
        height, width = image.shape[:2]
        x, y = (width - self.size) // 2, (height - self.size) // 2
        return T.CropTransform(x, y, self.size, self.size, width, height)
