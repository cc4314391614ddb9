"""Faulty sets, and configs that do not fit theirs, are refused in one line."""

import json
import shutil

import pytest
from PIL import Image

from wsbcn_d2.data import DataError
from wsbcn_d2.engine import load_config

from .sets import (
    CONFIG,
    EXIF_ORIENTATION,
    KEYPOINTS,
    NAMES,
    SIGMAS,
    SIZES,
    a_set,
    broken_runs,
    capital,
    change,
    corners,
    deep,
    every,
    keypoints,
    moved,
    no_masks,
    picture,
    run_lengths,
    saved,
    shares,
    three_classes,
    top,
    turned,
    without,
    write,
)

# What is done to a good set, the fault's line, and what the mend says.
FAULTS = {
    # The file.
    "a list": (lambda c, f: [c], "the file is a list", "is an object with the lists"),
    "cut off": (lambda c, f: json.dumps(c)[:200], "annotation file that is no JSON", "breaks off"),
    "binary": (lambda c, f: "\udcff\udcfe", "annotation file that is no JSON", "write it again"),
    "no images": (lambda c, f: c.pop("images"), "'images' is missing", "COCO's instance format"),
    "categories by name": (
        top(categories={"1": "round"}),
        "'categories' is no list of objects",
        "COCO's instance format",
    ),
    "annotations of numbers": (top(annotations=[1, 2]), "'annotations' is no list", "COCO's"),
    # Images.
    "no pictures": (top(images=[], annotations=[]), "no pictures", "list the pictures"),
    "image id as text": (change("images", id="1"), "image without a whole number as id", "number"),
    "image twice": (change("images", 1, id=1), "ids of images that are not unique", "of its own"),
    "no file name": (
        without("images", "file_name"),
        "image without a file_name",
        "(image 1): give it the picture's name",
    ),
    "no height": (without("images", "height"), "image without height and width", "whole pixels"),
    "width as text": (change("images", width="64"), "image without height and width", "'64'"),
    # Categories.
    "no categories": (top(categories=[], annotations=[]), "no categories", "name the classes"),
    "category twice": (change("categories", 1, id=1), "ids of categorys", "of its own"),
    "no category name": (without("categories", "name"), "category without a name", "category 1"),
    "one name twice": (change("categories", 1, name="round"), "two categories of one name", "re"),
    # Annotations.
    "annotation twice": (change("annotations", 1, id=1), "ids of annotations", "of its own"),
    "no annotation id": (without("annotations", "id"), "annotation without a whole number", "num"),
    "no image": (change("annotations", image_id=9), "an image that is not listed", "image_id 9"),
    "no class": (change("annotations", category_id=0), "category that does not exist", "_id 0"),
    "no box": (without("annotations", "bbox"), "bbox that is not four finite numbers", "pixels"),
    "empty box": (change("annotations", bbox=[]), "bbox that is not four finite numbers", "[]"),
    "NaN": (change("annotations", bbox=[1, 2, float("nan"), 4]), "four finite numbers", "nan"),
    "negative": (change("annotations", bbox=[30, 30, -9, 9]), "box of negative size", "width"),
    "outside": (change("annotations", bbox=[99, 5, 9, 9]), "box outside its picture", "pixels"),
    "corners": (corners, "boxes that look like corners", "in place of two corners"),
    "shares": (shares, "boxes that look like shares of the picture", "write pixels"),
    "no area": (without("annotations", "area", 3), "annotation without 'area'", "evaluation"),
    "no iscrowd": (without("annotations", "iscrowd"), "annotation without 'iscrowd'", "write 0"),
    "a wrong crowd": (change("annotations", iscrowd=2), "iscrowd that is not 0 or 1", "say 0"),
    "ignored": (change("annotations", ignore=1), "annotation with 'ignore'", "delete"),
    "no object": (top(annotations=[]), "no object in the whole set", "right file"),
    "crowds alone": (every("annotations", iscrowd=1), "no object in the whole set", "right"),
    # Masks.
    "line": (change("annotations", segmentation=[[1, 1, 9, 9]]), "fewer than three", "again"),
    "half a point": (change("annotations", segmentation=[[1] * 7]), "half a point", "again"),
    "flat polygon": (
        change("annotations", segmentation=[1, 1, 9, 1, 9, 9]),
        "mask that is no list of polygons",
        "even where there is but one",
    ),
    "polygon of text": (change("annotations", segmentation=[["1"] * 6]), "else than num", "fin"),
    "mask as text": (change("annotations", segmentation="mask.png"), "mask that is no mask", "run"),
    "run lengths": (run_lengths, "6 masks are run lengths", "set INPUT.MASK_FORMAT to bitmask"),
    "no masks": (no_masks, "no mask (annotation 1) with MODEL.MASK_ON on", "boxes alone"),
    "a mask missing": (without("annotations", "segmentation", 4), "1 without a mask", "turn it"),
    "turned run lengths": (
        broken_runs(lambda mask: mask.update(size=mask["size"][::-1])),
        "mask of another size than its picture",
        "height and width",
    ),
    "runs too long": (
        broken_runs(lambda mask: mask["counts"].append(5)),
        "run lengths that do not add up",
        "encode the mask again",
    ),
    "packed runs cut off": (
        broken_runs(lambda mask: mask.update(counts="0o")),
        "run lengths that do not add up",
        "encode the mask again",
    ),
    # Classes and the model.
    "more classes than the model": (
        three_classes,
        "3 classes, the model has 2: the last ones would be taken for background",
        "set MODEL.ROI_HEADS.NUM_CLASSES to 3",
    ),
    # Pictures.
    "missing": (lambda c, f: (f / "0.png").unlink(), "picture that is missing", "put it into"),
    "other case": (capital, "picture that is missing", "there is 0.PNG: case counts"),
    "backslash": (moved, "picture that is missing", "write / in place of \\"),
    "no folder": (lambda c, f: shutil.rmtree(f), "not found", "DATASETS.COCO_SETS"),
    "no picture": (picture(lambda p: p.write_text("<html>")), "file that is no picture", "PNG"),
    "empty file": (picture(lambda p: p.write_bytes(b"")), "file that is no picture", "PNG"),
    "other size": (saved("RGB", (64, 64)), "picture of another size than is said", "64 x 72"),
    "turned by 90": (turned(6), "EXIF turns the picture", "mogrify -auto-orient"),
    "turned TIFF": (
        lambda c, f: (
            turned(6, SIZES[0][::-1])(c, f)
            or Image.open(f / "0.png").save(f / "0.png", "TIFF", tiffinfo={EXIF_ORIENTATION: 6})
        ),
        "EXIF turns the picture",
        "orientation 6",
    ),
    "TIFF that Detectron2 turns back": (
        lambda c, f: (
            turned(6)(c, f)
            or Image.open(f / "0.png").save(f / "0.png", "TIFF", tiffinfo={EXIF_ORIENTATION: 6})
        ),
        "EXIF turns the picture",
        "orientation 6",
    ),
    "turned by 180": (turned(3), "EXIF turns the picture", "orientation 3"),
    "16 bits": (deep, "1 pictures of more than 8 bits (0.png", "INPUT.PICTURE_RANGE"),
    "floats": (
        lambda c, f: Image.new("F", SIZES[0]).save(f / "0.png", "TIFF"),
        "pictures of more than 8 bits (0.png, F",
        "INPUT.PICTURE_RANGE",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_faulty_set_is_one_line(case, command, tmp_path):
    spoil, fault, mend = FAULTS[case]
    content = a_set()
    entry = write(tmp_path / "data", content)
    result = spoil(content, tmp_path / "data" / "set")
    content = result if case in ("a list", "cut off", "binary") else content
    with open(entry["JSON"], "w", errors="surrogateescape") as file:
        file.write(content if isinstance(content, str) else json.dumps(content))
    before = sorted(path.name for path in (tmp_path / "data").rglob("*"))
    code, errors = command([entry], [entry])
    assert code == 2 and len(errors) == 1, errors
    assert fault in errors[0] and mend in errors[0] and "test_set" in errors[0]
    assert not (tmp_path / "output").exists() and not (tmp_path / "cache").exists()
    assert sorted(path.name for path in (tmp_path / "data").rglob("*")) == before


@pytest.mark.parametrize(
    "spoil, options, message",
    [
        (keypoints(0), [*KEYPOINTS, *SIGMAS], "no keypoints with MODEL.KEYPOINT_ON"),
        (keypoints(2, NAMES[:2]), [*KEYPOINTS, *SIGMAS], "2 keypoints, the model has 3"),
        (keypoints(3, NAMES[:2]), [*KEYPOINTS, *SIGMAS], "of another number than their category"),
        (keypoints(3, NAMES), KEYPOINTS, "evaluation has 17 numbers for 3 keypoints"),
        (keypoints(3), [*KEYPOINTS, *SIGMAS], "does not name its keypoints"),
        (keypoints(3, NAMES, False), [*KEYPOINTS, *SIGMAS], "5 objects without keypoints"),
        (change("annotations", keypoints=[1, 2, 7]), [], "keypoints that are not triples"),
        (change("annotations", keypoints=[1, 2]), [], "keypoints that are not triples"),
        (change("annotations", keypoints=["1", "2", 2]), [], "keypoints that are not triples"),
        (change("annotations"), ["INPUT.MASK_FORMAT", "rle"], "INPUT.MASK_FORMAT 'rle'"),
        (change("annotations"), ["INPUT.PICTURE_RANGE", "[9, 0]"], "INPUT.PICTURE_RANGE [9, 0]"),
        (change("annotations"), ["INPUT.PICTURE_RANGE", "[9]"], "INPUT.PICTURE_RANGE [9]"),
        (change("annotations"), ["INPUT.FORMAT", "L"], "INPUT.FORMAT L needs 1 numbers"),
        (change("annotations"), ["SOLVER.EPOCHS", "-1"], "SOLVER.EPOCHS -1"),
    ],
)
def test_a_config_that_does_not_fit_is_one_line(spoil, options, message, command, tmp_path):
    content = a_set()
    spoil(content, None)
    entry = write(tmp_path / "data", content)
    code, errors = command([entry], [entry], *options)
    assert code == 2 and len(errors) == 1 and message in errors[0], errors
    assert not (tmp_path / "output").exists()


def reordered(content):
    content["categories"][0]["name"], content["categories"][1]["name"] = "long", "round"


def renamed(content):
    content["categories"][1]["name"] = "tall"


@pytest.mark.parametrize(
    "other, message",
    [(renamed, "'long' is in one alone"), (reordered, "they come in another order")],
)
def test_sets_of_a_run_have_the_same_categories(other, message, command, tmp_path):
    content = a_set()
    other(content)
    one, two = write(tmp_path, a_set(), "one"), write(tmp_path, content, "two")
    for train, test in (([one], [two]), ([one, two], [one])):
        code, errors = command(train, test)
        assert code == 2 and len(errors) == 1 and message in errors[0], errors
        assert "test_one" in errors[0] and "test_two" in errors[0]


def test_area_and_iscrowd_are_asked_for_where_they_are_read(command, tmp_path):
    content = a_set()
    for annotation in content["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    train, test = write(tmp_path, content, "train"), write(tmp_path, a_set(), "val")
    assert command([train], [test]) == (0, [])


@pytest.mark.parametrize(
    "sets, message",
    [
        ("[{'NAME': 'x', 'JSON': 'x.json'}]", "is no data set: say {NAME"),
        ("['x.json']", "'x.json' is no data set"),
        ("[{'NAME': 'x', 'JSON': 3, 'IMAGES': 'x'}]", "must be text"),
        ("[{'NAME': 'shapes_train', 'JSON': 'x', 'IMAGES': 'x'}]", "belongs to another data set"),
    ],
)
def test_entries_that_name_no_set(sets, message):
    with pytest.raises(DataError, match=message):
        load_config(CONFIG, ["DATASETS.COCO_SETS", sets])
