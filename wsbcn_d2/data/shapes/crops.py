"""An image-classification view of the shapes set: one record per object, cut out with its
surroundings. Pre-training on it needs no images beyond those that the detector trains on."""

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

__all__ = ["object_crops", "register_shapes_crops"]

# Side of the square cut out, over the longer side of the object's box.
MARGIN = 1.3


def object_crops(records: list[dict], margin: float = MARGIN) -> list[dict]:
    """Turns detection records into classification records.

    Args:
        records: Detectron2 data set dicts with ``annotations``; crowds are left out.
        margin: side of the crop over the longer side of the object's box.

    Returns:
        One dict per object: ``file_name``, ``height`` and ``width`` of the image, ``image_id``
        (of the crop), ``label`` and ``crop_box``: x0, y0, x1, y1 in pixels, a square around the
        box as far as the image reaches.
    """
    crops = []
    for record in records:
        for annotation in record["annotations"]:
            if annotation.get("iscrowd", 0):
                continue
            x0, y0, x1, y1 = BoxMode.convert(
                annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS
            )
            half = max(x1 - x0, y1 - y0) * margin / 2
            x, y = (x0 + x1) / 2, (y0 + y1) / 2
            box = (
                max(0, int(x - half)),
                max(0, int(y - half)),
                min(record["width"], int(x + half) + 1),
                min(record["height"], int(y + half) + 1),
            )
            crop = {key: record[key] for key in ("file_name", "height", "width")}
            crop |= {"image_id": len(crops), "label": annotation["category_id"], "crop_box": box}
            crops.append(crop)
    return crops


def register_shapes_crops(name: str, shapes_name: str) -> None:
    """Registers the view of a registered shapes split, which is rendered when first loaded.

    Args:
        name: data set name in Detectron2's catalogs; must be free.
        shapes_name: the shapes split, by whatever is registered under that name when it is loaded.
    """
    DatasetCatalog.register(name, lambda: object_crops(DatasetCatalog.get(shapes_name)))
    MetadataCatalog.get(name).set(
        generator="wsbcn_d2.shapes_crops",
        evaluator_type="classification",
        thing_classes=MetadataCatalog.get(shapes_name).thing_classes,
    )
