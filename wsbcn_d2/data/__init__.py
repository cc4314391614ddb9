"""Data sets that come with the package; importing this registers them and writes nothing."""

from .classification import (
    ClassificationMapper,
    classification_mapper,
    classification_test_loader,
    register_classification,
)
from .coco import register_coco_sets
from .errors import ClassificationDataError, DataError
from .nuclei import register_nuclei
from .picture_range import RangeMapper, read_picture
from .shapes import (
    CLASSES,
    GENERATOR_VERSION,
    Instance,
    ShapesDataError,
    ShapesSpec,
    default_root,
    ensure_shapes,
    register_shapes,
    register_shapes_split,
    render_scene,
    write_shapes,
)

__all__ = [
    "CLASSES",
    "ClassificationDataError",
    "ClassificationMapper",
    "DataError",
    "GENERATOR_VERSION",
    "Instance",
    "RangeMapper",
    "ShapesDataError",
    "ShapesSpec",
    "classification_mapper",
    "classification_test_loader",
    "default_root",
    "ensure_shapes",
    "read_picture",
    "register_classification",
    "register_coco_sets",
    "register_nuclei",
    "register_shapes",
    "register_shapes_split",
    "render_scene",
    "write_shapes",
]

register_shapes()
register_classification()
register_nuclei()
