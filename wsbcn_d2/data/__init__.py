"""Data sets that come with the package; importing this registers them and writes nothing."""

from .classification import (
    ClassificationMapper,
    classification_mapper,
    classification_test_loader,
    register_classification,
)
from .errors import ClassificationDataError, DataError
from .nuclei import register_nuclei
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
    "ShapesDataError",
    "ShapesSpec",
    "classification_mapper",
    "classification_test_loader",
    "default_root",
    "ensure_shapes",
    "register_classification",
    "register_nuclei",
    "register_shapes",
    "register_shapes_split",
    "render_scene",
    "write_shapes",
]

register_shapes()
register_classification()
register_nuclei()
