"""Registered sets: where they lie, and what is asked of those of a run."""

import json
import logging
from contextlib import nullcontext
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from wsbcn_d2.data import DataError, register_coco_sets
from wsbcn_d2.data.checks import Wanted, check_sets, fit

from .sets import NAMES, a_set, keypoints, run_lengths, write


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


@pytest.mark.parametrize("role, refused", [("train", True), ("test", False)])
def test_run_lengths_are_no_polygons_where_they_are_trained_on(role, refused, tmp_path):
    content = a_set()
    run_lengths(content, None)
    register_coco_sets([write(tmp_path, content)])
    sets = {"train": [], "test": [], role: ["test_set"]}
    wanted = Wanted(masks=True, mask_format="polygon", format_key="KEY")
    with pytest.raises(DataError, match="set KEY to bitmask") if refused else nullcontext():
        check_sets(**sets, wanted=wanted)


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
