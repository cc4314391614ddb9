"""Image classification: where a detector's pre-trained weights come from.

``sources`` lists the pictures, ``augmentation`` and ``mapper`` make model inputs of them.
"""

from .mapper import (
    ClassificationMapper,
    classification_mapper,
    classification_test_loader,
    register_classification,
)
from .sources import load_cifar, load_image_folder, register_cifar, register_image_folder

__all__ = [
    "ClassificationMapper",
    "classification_mapper",
    "classification_test_loader",
    "load_cifar",
    "load_image_folder",
    "register_cifar",
    "register_classification",
    "register_image_folder",
]
