"""A look at the content of a COCO annotation file: what is missing, of a wrong type, impossible."""

import collections
import math

from .findings import Findings, shown
from .masks import check_mask

__all__ = ["check_content"]

_LISTS = ("images", "annotations", "categories")


def check_content(content: object, found: Findings) -> list[dict]:
    """Look at a parsed annotation file; faults, notes and facts are added to ``found``.

    Returns:
        list[dict]: the entries of pictures that are whole.
    """
    if not isinstance(content, dict):
        mend = "COCO format is an object with the lists images, annotations and categories"
        found.fault(f"the file is a {type(content).__name__}", "at its top", mend)
        return []
    for key in _LISTS:
        entries = content.get(key)
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            what = f"{key!r} is missing" if entries is None else f"{key!r} is no list of objects"
            found.fault(what, "at the top of the file", "write the file in COCO's instance format")
    if found.faults:
        return []
    categories = _check_categories(content["categories"], found)
    images = _check_images(content["images"], found)
    _check_annotations(content["annotations"], images, categories, found)
    return list(images.values())


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _by_id(entries: list[dict], what: str, found: Findings) -> dict[int, dict]:
    """Entries by their ids, which must be whole numbers that occur once."""
    result: dict[int, dict] = {}
    for i, entry in enumerate(entries):
        key = entry.get("id")
        if type(key) is not int:
            where = f"{what} number {i + 1} has {shown(key)}"
            found.fault(f"{what} without a whole number as id", where, "number them 1, 2, 3, ...")
        elif key in result:
            found.fault(
                f"ids of {what}s that are not unique", f"id {key}", "give each a number of its own"
            )
        else:
            result[key] = entry
    return result


def _check_categories(entries: list[dict], found: Findings) -> dict[int, dict]:
    categories = _by_id(entries, "category", found)
    if not entries:
        found.fault("no categories", "'categories' is empty", "name the classes there")
    for key, category in categories.items():
        if not isinstance(category.get("name"), str) or not category["name"]:
            found.fault("category without a name", f"category {key}", "give it one")
    names = [str(c.get("name")) for c in categories.values()]
    for name in sorted({name for name in names if names.count(name) > 1}):
        found.fault("two categories of one name", shown(name), "make them one, or rename one")
    found.facts["categories"] = [[k, str(c.get("name"))] for k, c in sorted(categories.items())]
    points = {key: c["keypoints"] for key, c in categories.items() if c.get("keypoints")}
    for key, names in points.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            mend = "list the keypoints' names"
            found.fault("keypoints of a category that are no names", f"category {key}", mend)
    found.facts["keypoint_names"] = next(iter(points.values()), [])
    return categories


def _check_images(entries: list[dict], found: Findings) -> dict[int, dict]:
    images = _by_id(entries, "image", found)
    if not entries:
        found.fault("no pictures", "'images' is empty", "list the pictures there")
    whole = {}
    for key, image in images.items():
        name, sides = image.get("file_name"), [image.get("height"), image.get("width")]
        if not isinstance(name, str) or not name:
            found.fault("image without a file_name", f"image {key}", "give it the picture's name")
        elif not all(type(side) is int and side > 0 for side in sides):
            mend = "give it the picture's size in whole pixels"
            where = f"image {key} has {shown(sides)}"
            found.fault("image without height and width", where, mend)
        else:
            whole[key] = image
    files = collections.Counter(image["file_name"] for image in whole.values())
    twice = [name for name, count in files.items() if count > 1]
    if twice:
        found.notes.append(f"{len(twice)} pictures are listed more than once, first {twice[0]!r}")
    return whole


def _check_annotations(
    entries: list[dict], images: dict[int, dict], categories: dict[int, dict], found: Findings
) -> None:
    facts = found.facts
    facts |= dict.fromkeys(("objects", "crowds", "polygons", "rle", "unmasked", "keypoints"), 0)
    facts |= {"small": 0, "medium": 0, "large": 0, "points": [], "images": len(images)}
    per_class: dict[int, int] = collections.Counter()
    with_objects, boxes = set(), []
    complete = not found.faults  # else every annotation of a missing image would be a fault too
    for annotation in _by_id(entries, "annotation", found).values():
        where = f"annotation {annotation['id']}"
        image = images.get(annotation.get("image_id"))
        if image is None:
            if complete:
                found.fault(
                    "annotation of an image that is not listed",
                    f"{where} has image_id {shown(annotation.get('image_id'))}",
                    "list the image or delete the annotation",
                )
            continue
        if annotation.get("category_id") not in categories:
            found.fault(
                "annotation of a category that does not exist",
                f"{where} has category_id {shown(annotation.get('category_id'))}",
                "list the category or correct the annotation",
            )
            continue
        crowd = annotation.get("iscrowd", 0)
        if crowd not in (0, 1):
            found.fault("iscrowd that is not 0 or 1", where, "say 0 for single objects")
        if annotation.get("ignore", 0) != 0:
            mend = "delete these annotations: Detectron2 knows no such thing"
            found.fault("annotation with 'ignore'", where, mend)
        for key in ("area", "iscrowd"):
            if not _is_number(annotation.get(key)):
                what = "the object's area in pixels" if key == "area" else "0"
                mend = f"evaluation reads it: write {what}"
                found.fault(f"annotation without {key!r}", where, mend, test_only=True)
        if _check_box(annotation, image, where, found):
            boxes.append((annotation["bbox"], image))
        kind = check_mask(annotation.get("segmentation"), image, where, found)
        if crowd:
            facts["crowds"] += 1
            continue
        facts["objects"] += 1
        facts[kind] += 1
        facts.setdefault(f"first_{kind}", annotation["id"])
        per_class[annotation["category_id"]] += 1
        with_objects.add(annotation["image_id"])
        _check_keypoints(annotation, categories[annotation["category_id"]], where, found)
        _count_size(annotation, facts)
    facts["with_objects"] = len(with_objects)
    facts["per_class"] = {str(key): per_class[key] for key in sorted(categories)}
    if complete and not facts["objects"]:
        mend = "is it the right file? a set without objects teaches and measures nothing"
        found.fault("no object in the whole set", f"{len(entries)} annotations", mend)
    idle = [name for key, name in facts["categories"] if not per_class[key]]
    if idle and len(idle) < len(categories):
        found.notes.append(f"{len(idle)} classes have no object, first {idle[0]!r}")
    _check_convention(boxes, found)


def _check_box(annotation: dict, image: dict, where: str, found: Findings) -> bool:
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        mend = "write x, y of its upper left corner, width and height in pixels"
        found.fault("bbox that is not four finite numbers", f"{where} has {shown(box)}", mend)
        return False
    x, y, width, height = box
    if width < 0 or height < 0:
        mend = "write x, y of its upper left corner, width and height"
        found.fault("box of negative size", f"{where} has {shown(box)}", mend)
    elif x >= image["width"] or y >= image["height"] or x + width < 0 or y + height < 0:
        mend = "write pixels of the picture as it is stored"
        found.fault("box outside its picture", f"{where} has {shown(box)}", mend)
    elif not width * height:
        found.facts["flat"] = found.facts.get("flat", 0) + 1
    return True


def _check_convention(boxes: list[tuple[list, dict]], found: Findings) -> None:
    """Corners or shares of the picture in place of x, y, width, height in pixels."""
    flat = found.facts.pop("flat", 0)
    if flat:
        found.notes.append(f"{flat} boxes have no area; training leaves these objects out")
    if len(boxes) < 2 or found.faults:
        return
    if all(max(box) <= 1 for box, _ in boxes):
        mend = "write pixels: multiply by the picture's width and height"
        found.fault("boxes that look like shares of the picture", "all are below 1", mend)
        return
    beyond = [
        (box, image)
        for box, image in boxes
        if box[0] + box[2] > image["width"] + 1 or box[1] + box[3] > image["height"] + 1
    ]
    corners = all(
        box[0] <= box[2] <= image["width"] + 1 and box[1] <= box[3] <= image["height"] + 1
        for box, image in boxes
    )
    if corners and len(beyond) * 5 > len(boxes):
        mend = "write x, y, width, height in place of two corners"
        found.fault("boxes that look like corners", f"one is {shown(beyond[0][0])}", mend)
    elif beyond:
        found.notes.append(f"{len(beyond)} boxes reach over the picture's edge and are cut there")


def _check_keypoints(annotation: dict, category: dict, where: str, found: Findings) -> None:
    points = annotation.get("keypoints")
    if not points:
        return
    numbers = isinstance(points, list) and all(map(_is_number, points))
    if not numbers or len(points) % 3 or any(v not in (0, 1, 2) for v in points[2::3]):
        mend = "write x, y and visibility (0, 1 or 2) of each"
        found.fault("keypoints that are not triples", where, mend)
        return
    names = category.get("keypoints")
    if names and len(names) * 3 != len(points):
        found.fault(
            "keypoints of another number than their category's",
            f"{where} has {len(points) // 3}, the category names {len(names)}",
            "write all of them, with visibility 0 where one is not there",
        )
    found.facts["keypoints"] += 1
    if len(points) // 3 not in found.facts["points"]:
        found.facts["points"].append(len(points) // 3)


def _count_size(annotation: dict, facts: dict) -> None:
    """COCO's three sizes, by the box where there is no area."""
    area, box = annotation.get("area"), annotation.get("bbox")
    if not _is_number(area):
        area = box[2] * box[3] if isinstance(box, list) and len(box) == 4 else 0
    if _is_number(area):
        facts["small" if area < 32**2 else "medium" if area < 96**2 else "large"] += 1
