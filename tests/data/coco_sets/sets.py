"""Small data sets in COCO format, to be spoiled by tests."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as mask_util

from wsbcn_d2.data.checks.annotations import check_content
from wsbcn_d2.data.checks.findings import Findings

ROOT = Path(__file__).resolve().parents[3]
CONFIG = str(ROOT / "configs" / "shapes" / "mask_rcnn_R_18_FPN_gn_ws.yaml")
EXIF_ORIENTATION = 0x0112
SIZES = [(64, 72), (72, 64), (80, 64)]  # width, height


def a_set():
    """The content of an annotation file: three pictures, two classes, a polygon an object."""
    images, annotations = [], []
    for i, (width, height) in enumerate(SIZES):
        images.append({"id": i + 1, "file_name": f"{i}.png", "width": width, "height": height})
        for j, (x, y) in enumerate(((5, 5), (30, 25))):
            annotations.append(
                {
                    "id": 2 * i + j + 1,
                    "image_id": i + 1,
                    "category_id": j + 1,
                    "bbox": [x, y, 24, 20],
                    "area": 480,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + 24, y, x + 24, y + 20, x, y + 20]],
                }
            )
    categories = [{"id": 1, "name": "round"}, {"id": 2, "name": "long"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def runs(x, y, image):
    """The mask of ``a_set``'s box at x, y as uncompressed run lengths."""
    mask = np.zeros((image["height"], image["width"]), np.uint8)
    mask[y : y + 20, x : x + 24] = 1
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {"size": [image["height"], image["width"]], "counts": counts}


def write(folder: Path, content, name="set"):
    """Write an annotation file and pictures of random pixels; gives the entry of COCO_SETS."""
    pictures = folder / name
    pictures.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate(SIZES):
        pixels = rng.integers(256, size=(height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{i}.png")
    path = folder / f"{name}.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return {"NAME": f"test_{name}", "JSON": str(path), "IMAGES": str(pictures)}


# What is done to a good set.


def change(key, index=0, **values):
    def spoil(content, folder):
        content[key][index].update(values)

    return spoil


def without(key, field, index=0):
    def spoil(content, folder):
        del content[key][index][field]

    return spoil


def every(key, **values):
    def spoil(content, folder):
        for entry in content[key]:
            entry.update(values)

    return spoil


def top(**values):
    def spoil(content, folder):
        content.update(values)

    return spoil


def picture(make):
    """Replace the first picture's file by what ``make(path)`` writes."""

    def spoil(content, folder):
        make(folder / "0.png")

    return spoil


def saved(mode, size=SIZES[0], **options):
    return picture(lambda path: Image.new(mode, size).save(path, **options))


def turned(orientation, size=SIZES[0]):
    def make(path):
        image = Image.new("RGB", size)
        exif = image.getexif()
        exif[EXIF_ORIENTATION] = orientation
        image.save(path, exif=exif)

    return picture(make)


def corners(content, folder):
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x, y, x + w, y + h]


def shares(content, folder):
    for annotation in content["annotations"]:
        annotation["bbox"] = [value / 100 for value in annotation["bbox"]]


def run_lengths(content, folder):
    for annotation in content["annotations"]:
        image = content["images"][annotation["image_id"] - 1]
        annotation["segmentation"] = runs(*annotation["bbox"][:2], image)


def broken_runs(change):
    def spoil(content, folder):
        run_lengths(content, folder)
        change(content["annotations"][0]["segmentation"])

    return spoil


def no_masks(content, folder):
    for annotation in content["annotations"]:
        del annotation["segmentation"]


def deep(content, folder):
    width, height = SIZES[0]
    pixels = np.linspace(100, 4000, width * height).reshape(height, width).astype(np.uint16)
    Image.fromarray(pixels).save(folder / "0.png")


def moved(content, folder):
    content["images"][0]["file_name"] = "pictures\\0.png"


def capital(content, folder):
    (folder / "0.png").rename(folder / "0.PNG")


def three_classes(content, folder):
    content["categories"].append({"id": 3, "name": "square"})
    content["annotations"][0]["category_id"] = 3


def keypoints(length, names=None, every_one=True):
    def spoil(content, folder):
        for annotation in content["annotations"][: None if every_one else 1]:
            annotation["keypoints"] = [9, 9, 2] * length
            annotation["num_keypoints"] = length
        for category in content["categories"]:
            if names:
                category["keypoints"] = names

    return spoil


KEYPOINTS = ["MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "3"]
KEYPOINTS += ["MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE", "1"]
SIGMAS = ["TEST.KEYPOINT_OKS_SIGMAS", "[0.1,0.1,0.1]"]
NAMES = ["left_end", "right_end", "middle"]


def with_ids_from_0(content, folder):
    for category in content["categories"]:
        category["id"] = 7 * (category["id"] - 1)
    for annotation in content["annotations"]:
        annotation["category_id"] = 7 * (annotation["category_id"] - 1)


def with_a_crowd(content, folder):
    content["annotations"][0].update(iscrowd=1, segmentation=runs(5, 5, content["images"][0]))


def with_packed_masks(content, folder):
    run_lengths(content, folder)
    for annotation in content["annotations"]:
        mask = annotation["segmentation"]
        packed = mask_util.frPyObjects(mask, *mask["size"])
        mask["counts"] = packed["counts"].decode()


def without_objects(content, folder):
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 2]


def at_absolute_paths(content, folder):
    for image in content["images"]:
        image["file_name"] = str(folder / image["file_name"])


def in_other_modes(content, folder):
    Image.new("L", SIZES[0], 90).save(folder / "0.png")
    Image.new("P", SIZES[1], 90).save(folder / "1.png")
    Image.new("CMYK", SIZES[2], (9, 9, 9, 9)).save(folder / "2.png", "JPEG")


def with_alpha_and_frames(content, folder):
    Image.new("LA", SIZES[0], (90, 9)).save(folder / "0.png")
    Image.new("1", SIZES[1]).save(folder / "1.png")
    frames = [Image.new("P", SIZES[2], i) for i in range(3)]
    frames[0].save(folder / "2.png", "GIF", save_all=True, append_images=frames[1:])


def under_unicode_names(content, folder):
    (folder / "bilder süß").mkdir()
    (folder / "0.png").rename(folder / "bilder süß" / "日本.png")
    content["images"][0]["file_name"] = "bilder süß/日本.png"


def turned_and_listed_so(content, folder):
    turned(6, SIZES[0][::-1])(content, folder)


def over_the_edge(content, folder):
    content["annotations"][0]["bbox"] = [-3, -3, 40, 40]


def flat_box(content, folder):
    content["annotations"][0]["bbox"] = [5, 5, 0, 10]


def with_unknown_fields(content, folder):
    content["info"] = {"year": 2018}
    content["annotations"][0].update(attributes={"hard": True}, num_keypoints=0)
    content["images"][0]["license"] = None


def listed_twice(content, folder):
    content["images"].append({**content["images"][0], "id": 9})
    content["annotations"].append({**content["annotations"][0], "id": 99, "image_id": 9})


def with_an_idle_class(content, folder):
    for annotation in content["annotations"]:
        annotation["category_id"] = 2


RANGE = ["INPUT.PICTURE_RANGE", "[0, 4095]"]
ONE_CHANNEL = ["INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", "[110.0]", "MODEL.PIXEL_STD", "[58.0]"]
BITMASK = ["INPUT.MASK_FORMAT", "bitmask"]


def looked_at(content):
    found = Findings()
    check_content(content, found)
    return found


def kinds(content):
    return [fault.what for fault in looked_at(content).serious()]
