"""The embedded set: scenes of textured objects, rendered from a seed into COCO format.

``outline`` draws the objects' forms, ``surface`` their textures, ``render`` whole scenes; ``write``
puts them on the disk, ``register`` into Detectron2's catalogs, ``crops`` shows single objects.
"""

from .crops import object_crops, register_shapes_crops
from .outline import CLASSES
from .register import register_shapes, register_shapes_split
from .render import Instance, render_scene
from .write import (
    GENERATOR_VERSION,
    ShapesDataError,
    ShapesSpec,
    default_root,
    ensure_shapes,
    write_shapes,
)

__all__ = [
    "CLASSES",
    "GENERATOR_VERSION",
    "Instance",
    "ShapesDataError",
    "ShapesSpec",
    "default_root",
    "ensure_shapes",
    "object_crops",
    "register_shapes",
    "register_shapes_crops",
    "register_shapes_split",
    "render_scene",
    "write_shapes",
]
