"""Sets that are odd and valid train, and their detectors predict."""

import json

import pytest
import torch
from detectron2.data import MetadataCatalog

from wsbcn_d2.cli.predict import main as predict
from wsbcn_d2.engine import load_config

from .sets import (
    BITMASK,
    KEYPOINTS,
    NAMES,
    ONE_CHANNEL,
    RANGE,
    SIGMAS,
    a_set,
    at_absolute_paths,
    change,
    deep,
    flat_box,
    in_other_modes,
    keypoints,
    listed_twice,
    no_masks,
    over_the_edge,
    run_lengths,
    turned_and_listed_so,
    under_unicode_names,
    with_a_crowd,
    with_alpha_and_frames,
    with_an_idle_class,
    with_ids_from_0,
    with_packed_masks,
    with_unknown_fields,
    without_objects,
    write,
)

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


def test_several_sets_are_one(command, tmp_path):
    one, two = write(tmp_path, a_set(), "one"), write(tmp_path, a_set(), "two")
    options = ["SOLVER.EPOCHS", "2", "SOLVER.IMS_PER_BATCH", "3"]
    assert command([one, two], [two], *options) == (0, [])
    saved = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)
    assert saved["iteration"] == 3  # 2 x 6 pictures, 3 a step: 0 to 3
