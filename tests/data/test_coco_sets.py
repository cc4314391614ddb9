"""Sets of one's own, by the config alone: faulty ones are refused in one line, odd ones train."""

import importlib.util
import json
import logging
import os
import runpy
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from coco_sets import SIZES, a_set, runs, write
from conftest import ROOT, TINY
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from PIL import Image
from pycocotools import mask as mask_util

from wsbcn_d2.cli.predict import main as predict
from wsbcn_d2.data import DataError, RangeMapper, read_picture, register_coco_sets
from wsbcn_d2.data.checks import (
    Wanted,
    check_sets,
    fit,
    look,
    look_at,
    memory,
    pictures,
    summarize,
)
from wsbcn_d2.data.checks.annotations import check_content
from wsbcn_d2.data.checks.findings import Findings, shown
from wsbcn_d2.data.checks.masks import _sum_of_runs, _unpack, check_mask
from wsbcn_d2.data.drawing import draw_some
from wsbcn_d2.data.picture_range import is_deep
from wsbcn_d2.engine import load_config
from wsbcn_d2.engine.from_config import schedule_by_epochs

CONFIG = str(ROOT / "configs" / "shapes" / "mask_rcnn_R_18_FPN_gn_ws.yaml")
EXIF_ORIENTATION = 0x0112


@pytest.fixture(autouse=True)
def own_names(tmp_path, monkeypatch):
    """What a test registers is gone after it; what is remembered, is remembered elsewhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def command(train_net, tmp_path, monkeypatch, capsys):
    """Runs tools/train_net.py on sets; gives exit code and the lines of its errors."""

    def call(train, test, *options):
        names = {entry["NAME"] for entry in train}, {entry["NAME"] for entry in test}
        sets = {entry["NAME"]: entry for entry in [*train, *test]}
        argv = [
            *("--config-file", CONFIG, *TINY, "OUTPUT_DIR", str(tmp_path / "output")),
            *("DATASETS.COCO_SETS", str(list(sets.values()))),
            *("DATASETS.TRAIN", str(tuple(names[0])), "DATASETS.TEST", str(tuple(names[1]))),
            *("MODEL.ROI_HEADS.NUM_CLASSES", "2", "INPUT.MASK_FORMAT", "polygon"),
            *("SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()", "SOLVER.CHECKPOINT_PERIOD", "100"),
            *("TEST.EVAL_PERIOD", "0", "SOLVER.WARMUP_ITERS", "0", *options),
        ]
        monkeypatch.setattr(sys, "argv", ["train_net.py", *argv])
        capsys.readouterr()
        code = train_net.cli()
        lines = [line for line in capsys.readouterr().err.splitlines() if line]
        if code == 2:
            assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return code, [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]

    return call


# What is done to a good set, the fault's line, and what the mend says.


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


KEYPOINTS = ["MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "3"]
KEYPOINTS += ["MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE", "1"]
SIGMAS = ["TEST.KEYPOINT_OKS_SIGMAS", "[0.1,0.1,0.1]"]
NAMES = ["left_end", "right_end", "middle"]


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


# Odd, and valid.


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
VALID = {
    "ids from 0, with gaps": (with_ids_from_0, []),
    "a crowd of run lengths": (with_a_crowd, []),
    "packed run lengths": (with_packed_masks, BITMASK),
    "plain run lengths": (run_lengths, BITMASK),
    "a picture without objects": (without_objects, []),
    "absolute paths": (at_absolute_paths, []),
    "grey, palette, CMYK": (in_other_modes, []),
    "alpha, two colours, frames": (with_alpha_and_frames, []),
    "unicode": (under_unicode_names, []),
    "turned by EXIF": (turned_and_listed_so, []),
    "over the edge": (over_the_edge, []),
    "a box without area": (flat_box, []),
    "other fields": (with_unknown_fields, []),
    "listed twice": (listed_twice, []),
    "a class without objects": (with_an_idle_class, []),
    "boxes only": (no_masks, ["MODEL.MASK_ON", "False"]),
    "16 bits, repeated": (deep, RANGE),
    "16 bits, one channel": (deep, [*RANGE, *ONE_CHANNEL]),
    "keypoints": (keypoints(3, NAMES), [*KEYPOINTS, *SIGMAS, *BITMASK]),
    "more classes in the model": (change("annotations"), ["MODEL.ROI_HEADS.NUM_CLASSES", "5"]),
}


@pytest.mark.parametrize("case", VALID)
def test_an_odd_set_trains(case, command, tmp_path):
    spoil, options = VALID[case]
    content = a_set()
    entry = write(tmp_path / "data", content)
    spoil(content, tmp_path / "data" / "set")
    with open(entry["JSON"], "w") as file:
        json.dump(content, file)
    assert command([entry], [entry], *options) == (0, [])
    output = tmp_path / "output"
    assert (output / "model_final.pth").is_file()
    # The dumped config stands by itself: the set is named in it.
    assert [entry] == load_config(str(output / "config.yaml")).DATASETS.COCO_SETS
    assert MetadataCatalog.get("test_set").thing_classes == ["round", "long"]


@pytest.mark.parametrize("options", [[], ["INPUT.FORMAT", "L"]])
def test_deep_pictures_are_predicted_on(options, command, tmp_path, capsys):
    """With the range of the checkpoint's own config; without one, a line says so."""
    content = a_set()
    entry = write(tmp_path / "data", content)
    deep(content, tmp_path / "data" / "set")
    options = ONE_CHANNEL if options else []
    assert command([entry], [entry], *RANGE, *options) == (0, [])
    weights = str(tmp_path / "output" / "model_final.pth")
    picture = str(tmp_path / "data" / "set" / "0.png")
    arguments = ["--weights", weights, "--output", str(tmp_path / "predicted"), picture]
    assert predict(arguments) == 0 and list((tmp_path / "predicted").iterdir())
    capsys.readouterr()
    arguments = ["--weights", weights, "--output", str(tmp_path / "none"), picture]
    assert predict([*arguments, "--opts", "INPUT.PICTURE_RANGE", "[]"]) == 2
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(errors) == 1 and "0.png has more than 8 bits" in errors[0]
    assert not (tmp_path / "none").exists()


def test_the_tool_sums_up_and_draws(tmp_path, monkeypatch, capsys):
    entry = write(tmp_path / "data", a_set())
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools" / "check_dataset.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(*options):
        words = ["check_dataset.py", entry["JSON"], entry["IMAGES"], *map(str, options)]
        monkeypatch.setattr(sys, "argv", words)
        return tool.cli(), *capsys.readouterr()

    code, out, err = run("--draw", tmp_path / "drawn", "--count", 2)
    assert code == 0 and not err
    assert "pictures   3, of 64 x 72 to 80 x 64 pixels; 0 without objects" in out
    assert "objects    6, 2.0 per picture; 100 % small" in out
    assert "masks      6 polygons, 0 run lengths" in out and "round  3" in out
    assert sorted(p.name for p in (tmp_path / "drawn").iterdir()) == ["1_0.png", "3_2.png"]
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(tool, "draw_some", lambda *args: asked.append(args) or [])
        assert run("--draw", "a")[0] == run("--draw", "b", "--picture-range", 1, 9)[0] == 0
    files = (entry["JSON"], entry["IMAGES"])
    assert asked == [(*files, "a", 6, ()), (*files, "b", 6, [1.0, 9.0])]
    # A picture that breaks off is found when its pixels are read, and every fault has its line.
    path = tmp_path / "data" / "set" / "0.png"
    path.write_bytes(path.read_bytes()[:3000])
    assert run()[0] == 0
    code, out, err = run("--decode")
    assert code == 2 and err.count("error: ") == 1 and "picture that cannot be read (0.png" in err
    deep(None, tmp_path / "data" / "set")
    (tmp_path / "data" / "set" / "1.png").unlink()
    code, out, err = run()
    assert code == 2 and err.count("\n") == 2 and "--picture-range" in err and "missing" in err
    assert run("--picture-range", 0, 4095)[2].count("\n") == 1
    assert not (tmp_path / "cache").exists()


def test_pictures_are_drawn_in_their_colours(tmp_path):
    content = a_set()
    entry = write(tmp_path, content)
    Image.new("RGB", SIZES[0], (230, 60, 20)).save(tmp_path / "set" / "0.png")
    paths = draw_some(entry["JSON"], entry["IMAGES"], str(tmp_path / "drawn"), 9)
    assert [Path(path).name for path in paths] == ["1_0.png", "2_1.png", "3_2.png"]
    drawn = np.asarray(Image.open(paths[0]))
    assert drawn[-2:, -2:].tolist() == [[[230, 60, 20]] * 2] * 2  # no object is there
    assert (drawn[5:45, 5:54] != (230, 60, 20)).any()
    assert f"__drawing__ {os.path.abspath(entry['JSON'])}" not in MetadataCatalog.list()


def test_the_tool_says_what_is_odd_and_no_fault(tmp_path, monkeypatch, capsys):
    content = a_set()
    over_the_edge(content, None)
    entry = write(tmp_path, content)
    tool = runpy.run_path(str(ROOT / "tools" / "check_dataset.py"))
    monkeypatch.setattr(sys, "argv", ["check_dataset.py", entry["JSON"], entry["IMAGES"]])
    assert tool["cli"]() == 0
    said = capsys.readouterr()
    assert said.err == "" and said.out.splitlines()[-1] == "  long   3"
    content["annotations"][0]["bbox"] = [-3, -3, 80, 40]
    Path(entry["JSON"]).write_text(json.dumps(content))
    assert tool["cli"]() == 0
    note = "note: 1 boxes reach over the picture's edge and are cut there"
    assert capsys.readouterr().out.splitlines()[-1] == note


def test_several_sets_are_one(command, tmp_path):
    one, two = write(tmp_path, a_set(), "one"), write(tmp_path, a_set(), "two")
    options = ["SOLVER.EPOCHS", "2", "SOLVER.IMS_PER_BATCH", "3"]
    assert command([one, two], [two], *options) == (0, [])
    saved = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)
    assert saved["iteration"] == 3  # 2 x 6 pictures, 3 a step: 0 to 3


def test_a_set_is_looked_at_once_for_each_state(tmp_path, monkeypatch):
    entry = write(tmp_path / "data", a_set())
    seen = []
    stock = look.check_content
    monkeypatch.setattr(look, "check_content", lambda *a: seen.append(1) or stock(*a))
    first = look_at(entry["JSON"], entry["IMAGES"])
    memory.keep(first)
    again = look_at(entry["JSON"], entry["IMAGES"])
    assert len(seen) == 1 and again.facts == json.loads(json.dumps(first.facts))
    folder = tmp_path / "cache" / "wsbcn_d2" / "datasets"
    assert folder.stat().st_mode & 0o777 == 0o700  # names of pictures are their owner's alone
    Image.new("RGB", (9, 9)).save(tmp_path / "data" / "set" / "0.png")
    assert look_at(entry["JSON"], entry["IMAGES"]).faults and len(seen) == 2
    assert look_at(entry["JSON"], entry["IMAGES"]).faults and len(seen) == 3  # not remembered
    for path in (tmp_path / "cache").rglob("*.json"):
        path.write_text("{")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "data" / "set.json"))  # no folder
    Image.new("RGB", SIZES[0]).save(tmp_path / "data" / "set" / "0.png")
    found = look_at(entry["JSON"], entry["IMAGES"])
    memory.keep(found)
    assert not found.faults


def test_packed_run_lengths_are_read_as_pycocotools_reads_them():
    rng = np.random.default_rng(0)
    for _ in range(50):
        shape = rng.integers(1, 90, size=2)
        mask = (rng.random(shape) < rng.random()).astype(np.uint8)
        packed = mask_util.encode(np.asfortranarray(mask))["counts"].decode()
        flat = mask.T.ravel()
        edges = np.flatnonzero(np.diff(flat)) + 1
        wanted = np.diff([0, *edges, flat.size])
        if flat[0]:
            wanted = np.concatenate([[0], wanted])
        assert _unpack(packed).tolist() == wanted.tolist()


def test_a_run_length_has_eleven_letters_at_most():
    """That is 55 bits; more of them would be shifted out of 64."""
    assert _sum_of_runs("P" * 10 + "0") == 0  # "P" says that more bits come, and has none itself
    assert _sum_of_runs("P" * 11 + "0") == -1


def test_what_is_remembered_is_of_the_very_same_files(tmp_path, monkeypatch):
    entry = write(tmp_path / "data", a_set())
    pictures = Path(entry["IMAGES"])

    def key(decode=False, json_file=entry["JSON"], images=pictures):
        return memory.key_of(str(json_file), str(images), decode)

    keys = [key(), key(decode=True)]
    assert key() == keys[0]
    for path in (Path(entry["JSON"]), pictures / "1.png"):
        content, state = path.read_bytes(), path.stat()
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))  # as large, written anew
        keys.append(key())
        path.write_bytes(content + b" ")
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        keys.append(key())
        path.write_bytes(content)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert key() == keys[0]
    (pictures / "1.png").rename(pictures / "3.png")
    keys.append(key())
    (pictures / "3.png").rename(pictures / "1.png")
    shutil.copytree(tmp_path / "data", tmp_path / "other")  # with its files' times
    keys.append(key(images=tmp_path / "other" / "set"))
    keys.append(key(json_file=tmp_path / "other" / "set.json"))
    assert key() == keys[0]
    monkeypatch.setattr(memory, "_VERSION", memory._VERSION + 1)
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key(json_file=tmp_path / "absent.json") is None


def test_what_is_kept_are_the_notes_and_facts_of_good_sets(tmp_path):
    memory.keep(Findings(notes=["odd"], facts={"images": 3}, key="good"))
    kept = memory.recall("good")
    assert (kept.notes, kept.facts, kept.faults, kept.key) == (["odd"], {"images": 3}, {}, None)
    bad = Findings(key="bad")
    bad.fault("what", "where", "mend")
    memory.keep(bad)
    assert memory.recall("bad") is None and memory.recall(None) is None
    assert [path.name for path in (tmp_path / "cache").rglob("*.json")] == ["good.json"]


def looked_at(content):
    found = Findings()
    check_content(content, found)
    return found


def test_sizes_are_those_of_coco():
    """Small below 32 x 32, large from 96 x 96 on; by the box where there is no area."""
    content = a_set()
    for annotation, area in zip(content["annotations"], (1023, 1024, 9215, 9216, 0), strict=False):
        annotation["area"] = area
    del content["annotations"][5]["area"]
    content["annotations"][5]["bbox"] = [0, 0, 32, 32]
    facts = looked_at(content).facts
    assert (facts["small"], facts["medium"], facts["large"]) == (2, 3, 1)


def test_every_number_of_a_summary(tmp_path):
    """Of four pictures, one without objects; a crowd counts as none of them."""
    content = a_set()
    content["images"].append({**content["images"][0], "id": 4})
    content["annotations"][0].update(iscrowd=1)
    content["annotations"][1]["area"] = 32**2
    content["annotations"][2]["area"] = 96**2
    del content["annotations"][3]["segmentation"]
    content["annotations"][4]["segmentation"] = runs(5, 5, content["images"][2])
    for annotation in content["annotations"][:3]:
        annotation["keypoints"] = [9, 9, 2] * 3
    entry = write(tmp_path, content)
    assert summarize(look_at(entry["JSON"], entry["IMAGES"]).facts).splitlines() == [
        "pictures   4, of 64 x 72 to 80 x 64 pixels; 1 without objects",
        "objects    5, 1.2 per picture; 60 % small, 20 % medium, 20 % large "
        "(below 32 x 32, 96 x 96 pixels, above)",
        "masks      3 polygons, 1 run lengths, 1 objects without; 1 crowd regions",
        "keypoints  2 objects, [3] points each",
        "classes    2",
        "  round  2",
        "  long   3",
    ]


def test_a_refusal_counts_places_and_kinds():
    found = Findings()
    for place in ("a", "b", "c"):
        found.fault("what", place, "mend")
    found.fault("of evaluation", "d", "mend it", test_only=True)
    with pytest.raises(DataError) as error:
        found.refuse("set")
    more = " (and 1 other kinds: tools/check_dataset.py lists them)"
    assert str(error.value) == "set: what (a and 2 more): mend" + more
    with pytest.raises(DataError) as error:
        found.refuse("set", test=False)
    assert str(error.value) == "set: what (a and 2 more): mend"
    del found.faults["what"]
    found.refuse("set", test=False)
    with pytest.raises(DataError, match=r"^set: of evaluation \(d\): mend it$"):
        found.refuse("set")


@pytest.mark.parametrize("length, whole", [(58, True), (59, False)])
def test_a_value_in_a_message_is_not_long(length, whole):
    text = shown("x" * length)  # and two quotes
    assert text == ("'" + "x" * length + "'" if whole else "'" + "x" * 56 + "...")


@pytest.mark.parametrize("place, side", [(0, "width"), (1, "height")])
def test_a_box_outside_its_picture(place, side):
    """Its corner lies beyond the last pixel, or all of it before the first."""
    content = a_set()
    size = content["images"][0][side]
    for start, length, outside in (
        *((size - 1, 5, False), (size, 5, True), (-9, 9, False), (-9.5, 9, True)),
    ):
        box = [5, 5, 20, 20]
        box[place], box[place + 2] = start, length
        content["annotations"][0]["bbox"] = box
        faults = [fault.what for fault in looked_at(content).serious()]
        assert faults == ["box outside its picture"] * outside


@pytest.mark.parametrize("side", ["width", "height"])
@pytest.mark.parametrize("value, whole", [(1, True), (0, False), (-3, False), (7.0, False)])
def test_sides_are_positive_and_whole(side, value, whole):
    content = a_set()
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] > 1]
    content["images"][0][side] = value
    faults = [fault.what for fault in looked_at(content).serious()]
    assert faults == ["image without height and width"] * (not whole)


def test_every_note_of_a_set(tmp_path):
    """What is odd is said once a kind, and is no fault."""
    content = a_set()
    with_an_idle_class(content, None)
    listed_twice(content, None)
    content["annotations"][-1]["category_id"] = 2
    entry = write(tmp_path / "data", content)
    folder = tmp_path / "data" / "set"
    turned_and_listed_so(content, folder)
    frames = [Image.new("RGB", SIZES[1], (90 * i, 0, 0)) for i in range(3)]
    frames[0].save(folder / "1.png", "GIF", save_all=True, append_images=frames[1:])
    colour = cv2.imencode(".png", np.zeros((*SIZES[2][::-1], 3), np.uint16))[1]
    (folder / "2.png").write_bytes(colour.tobytes())
    assert look_at(entry["JSON"], entry["IMAGES"]).notes == [
        "1 pictures are listed more than once, first '0.png'",
        "1 classes have no object, first 'round'",
        "2 pictures: turned by EXIF, and listed with the size that is seen then",
        "1 pictures: of several frames, of which the first is used",
        "1 pictures: colour of 16 bits, of which the upper 8 are used",
    ]


@pytest.mark.parametrize("classes, said", [(2, 0), (3, 1)])
def test_classes_that_are_never_seen_are_said(classes, said, tmp_path, caplog):
    entry = write(tmp_path, a_set())
    register_coco_sets([entry])
    with caplog.at_level(logging.WARNING, logger="wsbcn_d2"):
        check_sets(["test_set"], [], Wanted(classes=classes, classes_key="KEY"))
    assert [record.getMessage() for record in caplog.records] == [
        "data set 'test_set': the model has 3 classes and the data 2: the others are never seen "
        "(KEY)"
    ] * said


def test_the_first_of_several_deep_pictures_is_named(tmp_path):
    content = a_set()
    entry = write(tmp_path, content)
    for i, (width, height) in enumerate(SIZES):
        deep = np.full((height, width), 100 * (i + 3), np.uint16)
        deep[0, 0] = i
        Image.fromarray(deep).save(tmp_path / "set" / f"{i}.png")
    facts = look_at(entry["JSON"], entry["IMAGES"]).facts
    assert (facts["deep"], facts["first_deep"], facts["deep_range"]) == (
        *(3, ["0.png", "I;16"]),
        [0, 300],
    )


@pytest.mark.parametrize("role, refused", [("train", True), ("test", False)])
def test_run_lengths_are_no_polygons_where_they_are_trained_on(role, refused, tmp_path):
    content = a_set()
    run_lengths(content, None)
    register_coco_sets([write(tmp_path, content)])
    sets = {"train": [], "test": [], role: ["test_set"]}
    wanted = Wanted(masks=True, mask_format="polygon", format_key="KEY")
    with pytest.raises(DataError, match="set KEY to bitmask") if refused else nullcontext():
        check_sets(**sets, wanted=wanted)


@pytest.mark.parametrize("place, side", [(0, "width"), (1, "height")])
def test_a_box_may_reach_over_the_edge_by_a_pixel(place, side):
    for over, notes in ((1, []), (2, ["1 boxes reach over the picture's edge and are cut there"])):
        content = a_set()
        box = content["annotations"][0]["bbox"]
        box[place], box[place + 2] = 40, content["images"][0][side] - 40 + over
        assert looked_at(content).notes == notes


@pytest.mark.parametrize("beyond, faults", [(2, 0), (3, 1)])
def test_corners_are_told_by_more_than_a_fifth_of_the_boxes(beyond, faults):
    """Ten boxes that all could be corners; those that reach beyond could be nothing else."""
    content = a_set()
    one = content["annotations"][0]
    boxes = [[40, 10, 60, 20] if i < beyond else [5, 5, 20, 20] for i in range(10)]
    content["annotations"] = [{**one, "id": i, "bbox": box} for i, box in enumerate(boxes, 1)]
    found = looked_at(content)
    assert [fault.what for fault in found.serious()] == ["boxes that look like corners"] * faults
    assert len(found.notes) == 1 + 1 - faults  # of the class without objects, and the edge


@pytest.mark.parametrize("place, side", [(2, "width"), (3, "height")])
def test_a_corner_may_lie_a_pixel_beyond_the_edge(place, side):
    """One that lies farther out is no corner, and then none is."""
    for over, faults in ((1, 1), (2, 0)):
        content = a_set()
        one, image = content["annotations"][0], content["images"][0]
        boxes = [[40, 40, image["width"], image["height"]] for _ in range(4)]
        boxes[0][place] += over
        content["annotations"] = [{**one, "id": i, "bbox": box} for i, box in enumerate(boxes, 1)]
        found = [fault.what for fault in looked_at(content).serious()]
        assert found == ["boxes that look like corners"] * faults


@pytest.mark.parametrize("names", [NAMES, ["nose", "left_eye", "right_eye"]])
def test_keypoints_that_a_mirror_swaps(names, tmp_path):
    content = a_set()
    keypoints(3, names)(content, None)
    register_coco_sets([write(tmp_path, content)])
    DatasetCatalog.get("test_set")
    metadata, (left, right) = (
        MetadataCatalog.get("test_set"),
        sorted(set(names) - {"middle", "nose"}),
    )
    assert metadata.keypoint_names == tuple(names)
    assert metadata.keypoint_flip_map == ((left, right),)


# Pictures of more than 8 bits.


@pytest.mark.parametrize("image_format, channels", [("RGB", 3), ("BGR", 3), ("L", 1)])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_range_is_scaled(image_format, channels, suffix, tmp_path):
    values = np.array([[0, 100, 1100], [2100, 4000, 65535]], np.uint16)
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(values).save(path)
    out = read_picture(str(path), image_format, [100, 2100])
    assert out.dtype == np.uint8 and out.shape == (2, 3, channels)
    expected = np.array([[0, 0, 128], [255, 255, 255]])
    assert all(np.array_equal(out[..., c], expected) for c in range(channels))
    with pytest.raises(DataError, match="has more than 8 bits .*set INPUT.PICTURE_RANGE"):
        read_picture(str(path), image_format)


@pytest.mark.parametrize("limits", [[9, 0], [9], [1, 1], ["a", "b"], [True, 2]])
def test_a_mapper_with_a_range_that_is_none_is_refused(limits):
    with pytest.raises(DataError, match="say the values that become black and white"):
        RangeMapper(lambda record: record, limits)


def test_a_mapper_with_a_range_gives_its_records_their_names_back(tmp_path):
    values = np.array([[0, 2048], [4095, 9999]], np.uint16)
    path = str(tmp_path / "a.png")
    Image.fromarray(values).save(path)

    def mapper(record):
        return {**record, "image": read_image(record["file_name"], "L")}

    record = {"file_name": path, "image_id": 3}
    out = RangeMapper(mapper, [0, 4095])(record)
    assert (out["file_name"], out["image_id"]) == (path, 3) and record["file_name"] == path
    assert out["image"][..., 0].tolist() == [[0, 128], [255, 255]]


def test_pictures_of_8_bits_are_left_alone_by_a_range(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(9, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for limits in ([], [0, 4095]):
        assert np.array_equal(read_picture(str(tmp_path / "a.png"), "RGB", limits), pixels)


def test_a_deep_picture_is_turned_as_others_are(tmp_path):
    for dtype, name in ((np.uint8, "8.png"), (np.uint16, "16.png")):
        image = Image.fromarray(np.arange(6, dtype=dtype).reshape(2, 3) * 51)
        exif = image.getexif()
        exif[EXIF_ORIENTATION] = 6
        image.save(tmp_path / name, exif=exif)
    plain = read_picture(str(tmp_path / "8.png"), "L")
    assert plain.shape == (3, 2, 1)
    assert np.array_equal(read_picture(str(tmp_path / "16.png"), "L", [0, 255]), plain)


# Epochs.


@pytest.mark.parametrize(
    "epochs, images, wanted",
    [(10, 1, (30, (21, 27), 3, 3, 3)), (10, 2, (15, (10, 14), 2, 2, 1)), (0, 1, None)],
)
def test_epochs_become_iterations(epochs, images, wanted, tmp_path):
    entry = write(tmp_path, a_set())
    options = [
        *("DATASETS.COCO_SETS", str([entry]), "DATASETS.TRAIN", "('test_set',)"),
        *("SOLVER.MAX_ITER", "1000", "SOLVER.STEPS", "(700, 900)", "TEST.EVAL_PERIOD", "100"),
        *("SOLVER.CHECKPOINT_PERIOD", "100", "SOLVER.WARMUP_ITERS", "50"),
        *("SOLVER.EPOCHS", str(epochs), "SOLVER.IMS_PER_BATCH", str(images)),
    ]
    cfg = load_config(CONFIG, options)
    solver = schedule_by_epochs(cfg).SOLVER
    if wanted is None:
        assert solver is cfg.SOLVER
        return
    out = schedule_by_epochs(cfg)
    assert wanted == (
        *(solver.MAX_ITER, solver.STEPS, out.TEST.EVAL_PERIOD, solver.CHECKPOINT_PERIOD),
        solver.WARMUP_ITERS,
    )
    assert cfg.SOLVER.MAX_ITER == 1000 and cfg.is_frozen() and out.is_frozen()


@pytest.mark.parametrize("empty, images", [(True, 2), (False, 3)])
def test_epochs_are_of_the_pictures_that_are_trained_on(empty, images, tmp_path):
    content = a_set()
    without_objects(content, None)
    options = [
        *("DATASETS.COCO_SETS", str([write(tmp_path, content)]), "DATASETS.TRAIN", "('test_set',)"),
        *("DATALOADER.FILTER_EMPTY_ANNOTATIONS", str(empty), "SOLVER.EPOCHS", "7"),
    ]
    assert 7 * images == schedule_by_epochs(load_config(CONFIG, options)).SOLVER.MAX_ITER


@pytest.mark.parametrize("least, images", [(1, 1), (4, 0)])
def test_epochs_are_of_the_pictures_with_enough_keypoints(least, images, tmp_path):
    content = a_set()
    keypoints(3, NAMES)(content, None)
    for annotation in content["annotations"][1:]:
        annotation["num_keypoints"], annotation["keypoints"] = 0, [0] * 9
    options = [
        *("DATASETS.COCO_SETS", str([write(tmp_path, content)]), "DATASETS.TRAIN", "('test_set',)"),
        *(*KEYPOINTS[:2], "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE", str(least)),
        *("SOLVER.EPOCHS", "7"),
    ]
    if not images:
        with pytest.raises(AssertionError, match="No valid data"):
            schedule_by_epochs(load_config(CONFIG, options))
        return
    assert 7 * images == schedule_by_epochs(load_config(CONFIG, options)).SOLVER.MAX_ITER


def test_another_folder_of_pictures_is_another_set(tmp_path):
    entry, other = write(tmp_path, a_set()), write(tmp_path, a_set(), "other")
    register_coco_sets([entry])
    register_coco_sets([{**entry, "IMAGES": other["IMAGES"]}])
    metadata = MetadataCatalog.get("test_set")
    assert (metadata.json_file, metadata.image_root) == (entry["JSON"], other["IMAGES"])
    assert Path(DatasetCatalog.get("test_set")[0]["file_name"]).parent == Path(other["IMAGES"])


def test_a_path_that_is_here_is_not_looked_for_elsewhere(tmp_path, monkeypatch):
    write(tmp_path / "here", a_set())
    there = write(tmp_path / "there", a_set(), "only")
    write(tmp_path / "there", a_set())
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "there"))
    register_coco_sets([{"NAME": "test_set", "JSON": "set.json", "IMAGES": "set"}])
    register_coco_sets([{"NAME": "test_only", "JSON": "only.json", "IMAGES": "only"}])
    places = [MetadataCatalog.get(name) for name in ("test_set", "test_only")]
    assert [(m.json_file, m.image_root) for m in places] == [
        ("set.json", "set"),
        (there["JSON"], there["IMAGES"]),
    ]


def test_registering_again_and_elsewhere(tmp_path, monkeypatch):
    entry = write(tmp_path / "a", a_set())
    register_coco_sets([entry])
    metadata = MetadataCatalog.get("test_set")
    register_coco_sets([entry])
    assert MetadataCatalog.get("test_set") is metadata
    other = write(tmp_path / "b", a_set())
    register_coco_sets([other])
    assert MetadataCatalog.get("test_set").json_file == other["JSON"]
    register_coco_sets([{**other, "IMAGES": entry["IMAGES"]}])  # the same file, other pictures
    assert MetadataCatalog.get("test_set").image_root == entry["IMAGES"]
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "a"))
    register_coco_sets([{"NAME": "test_set", "JSON": "set.json", "IMAGES": "set"}])
    assert MetadataCatalog.get("test_set").json_file == entry["JSON"]
    assert len(DatasetCatalog.get("test_set")) == 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("listed", ["as stored", "as seen"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_every_way_that_exif_turns_a_picture(orientation, listed, kind, tmp_path):
    """One that is mirrored or upside down is refused; on its side, if it is not listed so."""
    stored = (72, 64)
    if kind == "TIFF":
        Image.new("RGB", stored).save(
            tmp_path / "a", "TIFF", tiffinfo={EXIF_ORIENTATION: orientation}
        )
    else:
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        Image.new("RGB", stored).save(tmp_path / "a", kind, exif=exif)
    sideways = orientation >= 5
    width, height = stored[::-1] if listed == "as seen" and sideways else stored
    entry = {"file_name": "a", "width": width, "height": height}
    fault, notes, deep = pictures._look(str(tmp_path / "a"), entry, False)
    assert deep == ""
    if orientation == 1:
        assert fault is None and notes == []
    elif sideways and listed == "as seen" and kind != "TIFF":
        assert fault is None
        assert notes == ["turned by EXIF, and listed with the size that is seen then"]
    else:
        assert fault[0] == "EXIF turns the picture, which Detectron2 obeys"
        assert fault[1] == f"a, orientation {orientation}" and notes == []


def test_pictures_that_are_too_large_or_elsewhere(tmp_path, monkeypatch):
    entry = {"file_name": "0.png", "width": 64, "height": 72}
    write(tmp_path, a_set())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    fault, _, _ = pictures._look(str(tmp_path / "set" / "0.png"), entry, True)
    assert fault == ("picture of too many pixels", "0.png", "cut it into tiles")
    url = {**entry, "file_name": "http://x/0.png"}
    fault, _, _ = pictures._look(str(tmp_path / "set" / "http://x/0.png"), url, True)
    mend = "download it: file_name is a path in the picture folder"
    assert fault == ("picture that is missing", "http://x/0.png", mend)
    fault, _, _ = pictures._look(
        str(tmp_path / "set" / "a" / "0.png"), {**entry, "file_name": "a/0.png"}, True
    )
    folder = tmp_path / "set" / "a"
    assert fault[2] == f"put it into {folder}, or give the folder that file_name starts from"


@pytest.mark.parametrize("count, shown", [(5000, []), (5001, [5001])])
def test_progress_is_shown_of_large_sets(count, shown, tmp_path, monkeypatch):
    totals = []
    monkeypatch.setattr(pictures, "_look", lambda *a: (None, [], ""))
    monkeypatch.setattr(
        pictures, "progress", lambda seen, *, total, desc: totals.append(total) or seen
    )
    entry = {"file_name": "a", "width": 3, "height": 4}
    found = Findings()
    entries = [{**entry, "width": 9}, *[entry] * (count - 1)]
    pictures.check_pictures(entries, str(tmp_path), found)
    assert totals == shown and found.facts == {"deep": 0, "sizes": [[3, 4], [9, 4]]}


def kinds(content):
    return [fault.what for fault in looked_at(content).serious()]


def test_a_fault_is_said_once_and_not_what_follows_of_it():
    """Annotations of a picture that is no picture, a set that so has no object."""
    content = a_set()
    del content["images"][0]["file_name"]
    assert kinds(content) == ["image without a file_name"]
    content["annotations"] = []
    assert kinds(content) == ["image without a file_name"]
    content = a_set()
    content["annotations"] = []
    assert kinds(content) == ["no object in the whole set"]


@pytest.mark.parametrize("names", ["nose", [1, 2], {"a": "b"}])
def test_keypoints_of_a_category_are_names(names):
    content = a_set()
    content["categories"][1]["keypoints"] = names
    found = looked_at(content)
    (fault,) = found.serious()
    assert (fault.what, fault.where, fault.mend) == (
        "keypoints of a category that are no names",
        "category 2",
        "list the keypoints' names",
    )


def test_facts_of_keypoints_and_classes():
    content = a_set()
    keypoints(3)(content, None)
    for annotation in content["annotations"][:2]:
        annotation["keypoints"] = [9, 9, 2] * 2
    content["annotations"][5]["keypoints"] = []
    content["categories"].reverse()
    facts = looked_at(content).facts
    assert (facts["keypoints"], facts["points"], facts["keypoint_names"]) == (5, [2, 3], [])
    assert facts["categories"] == [[1, "round"], [2, "long"]]
    assert facts["per_class"] == {"1": 3, "2": 3} and list(facts["per_class"]) == ["1", "2"]
    assert (facts["images"], facts["with_objects"], facts["first_polygons"]) == (3, 3, 1)


@pytest.mark.parametrize("key", ["area", "iscrowd"])
@pytest.mark.parametrize("value", [None, "0", True, float("inf"), []])
def test_numbers_of_an_annotation_that_are_none(key, value):
    content = a_set()
    content["annotations"][0][key] = value
    found = looked_at(content)
    whats = [fault.what for fault in found.serious()]
    assert f"annotation without {key!r}" in whats
    assert f"annotation without {key!r}" not in [f.what for f in found.serious(test=False)]
    content = a_set()
    content["annotations"][0]["bbox"][2] = value
    assert kinds(content) == ["bbox that is not four finite numbers"]


@pytest.mark.parametrize(
    "boxes, faults",
    [
        ([[0, 0, 1, 1]], 0),  # one alone may be a small object
        ([[0, 0, 1, 1], [0.5, 0, 0.5, 1]], 1),
        ([[0, 0, 1, 1], [0.5, 0, 0.5, 1.5]], 0),
    ],
)
def test_shares_are_told_by_all_of_several_boxes(boxes, faults):
    content = a_set()
    one = content["annotations"][0]
    content["annotations"] = [{**one, "id": i, "bbox": box} for i, box in enumerate(boxes, 1)]
    assert kinds(content) == ["boxes that look like shares of the picture"] * faults


@pytest.mark.parametrize(
    "mask, kind, faults",
    [
        ([[1, 1, 9, 1, 9, 9]], "polygons", 0),
        ([[1, 1, 9, 1, 9.5, float("nan")]], "polygons", 1),
        ([[1, 1, 9, 1, 9, True]], "polygons", 1),
        (([], {}, None), "unmasked", 0),
        (((), "", 3), "unmasked", 1),
    ],
)
def test_kinds_of_masks(mask, kind, faults):
    for each in mask if isinstance(mask, tuple) else (mask,):
        found = Findings()
        assert check_mask(each, {"height": 9, "width": 9}, "here", found) == kind
        assert len(found.faults) == faults, each


@pytest.mark.parametrize(
    "counts, pixels",
    [
        *(([3, 4], 7), ([], 0), ([0, 7], 7), ([-1, 8], -1), ([3.0, 4], -1), ([True, 6], -1)),
        *((None, -1), ("", -1), ("P", -1), ("1p", -1), (b"07", -1), ("07", 7)),
    ],
)
def test_pixels_that_run_lengths_cover(counts, pixels):
    assert _sum_of_runs(counts) == pixels


def test_sets_of_detectron2_and_others_formats_are_not_looked_at(tmp_path, monkeypatch):
    looked = []
    stock = fit.look_at
    monkeypatch.setattr(fit, "look_at", lambda *a: looked.append(a) or stock(*a))
    entry = write(tmp_path, a_set())
    for name, more in {
        "test_other_format": {"evaluator_type": "pascal_voc", "json_file": entry["JSON"]},
        "test_no_file": {"evaluator_type": "coco"},
        "test_rendered": {"evaluator_type": "coco", "json_file": "absent", "generator": print},
    }.items():
        DatasetCatalog.register(name, list)
        MetadataCatalog.get(name).set(image_root=entry["IMAGES"], **more)
    names = ["coco_2017_train", "keypoints_coco_2017_val"]
    check_sets([*names, "test_other_format"], ["test_no_file", "test_rendered"], Wanted())
    assert looked == []
    register_coco_sets([entry])
    check_sets(["test_set"], ["test_set"], Wanted())
    assert looked == [(entry["JSON"], entry["IMAGES"])]
    content = a_set()
    del content["annotations"][0]["area"]
    Path(entry["JSON"]).write_text(json.dumps(content))
    check_sets(["test_set"], [], Wanted())
    with pytest.raises(DataError, match="annotation without 'area'"):
        check_sets(["test_set"], ["test_set"], Wanted())


def test_a_file_that_is_not_there(tmp_path):
    (fault,) = look_at(str(tmp_path / "no.json"), str(tmp_path)).serious()
    where = f"{tmp_path / 'no.json'}: No such file or directory"
    assert str(fault) == f"no annotation file ({where}): check the path"


@pytest.mark.parametrize(
    "mode, deep",
    [
        *((mode, True) for mode in ("I", "F", "I;16", "I;16B", "I;16L")),
        *((mode, False) for mode in ("1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr")),
    ],
)
def test_modes_of_more_than_8_bits(mode, deep):
    assert is_deep(SimpleNamespace(mode=mode)) is deep


def test_epochs_of_few_pictures_are_a_step(tmp_path):
    options = [
        *("DATASETS.COCO_SETS", str([write(tmp_path, a_set())]), "DATASETS.TRAIN", "('test_set',)"),
        *("SOLVER.EPOCHS", "1", "SOLVER.IMS_PER_BATCH", "100", "TEST.EVAL_PERIOD", "0"),
    ]
    cfg = schedule_by_epochs(load_config(CONFIG, options))
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.EPOCHS, cfg.TEST.EVAL_PERIOD) == (1, 0, 0)
    assert cfg.SOLVER.WARMUP_ITERS == 0
