"""The unchanged COCO configs on real COCO pictures, crowds included: they train and evaluate."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A small part of COCO 2017: annotations/{train,val}.json, train/, val/.
MINI = Path(os.getenv("DETECTRON2_DATASETS", "datasets")) / "coco_mini"


def train(folder, config, *options, timeout=900):
    """What ``tools/train_net.py`` wrote into a folder's ``out/metrics.json``, a dict per line."""
    command = [sys.executable, str(ROOT / "tools" / "train_net.py"), "--config-file"]
    command += [str(ROOT / "configs" / config), *options]
    command += ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(folder / "out"), "SEED", "1"]
    env = {**os.environ, "DETECTRON2_DATASETS": str(folder), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(x) for x in (folder / "out" / "metrics.json").read_text().splitlines()]


@pytest.fixture
def coco(tmp_path):
    """A few of its pictures, a crowd among them, under the names of the whole."""
    if not MINI.is_dir():
        pytest.skip(f"{MINI} is absent")
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        content = json.loads((MINI / "annotations" / f"{split}.json").read_text())
        crowds = {a["image_id"] for a in content["annotations"] if a["iscrowd"]}
        images = sorted(content["images"], key=lambda image: image["id"] not in crowds)[:4]
        ids = {image["id"] for image in images}
        assert crowds & ids
        found = [a for a in content["annotations"] if a["image_id"] in ids]
        path = tmp_path / "coco" / "annotations" / f"instances_{split}2017.json"
        path.write_text(json.dumps({**content, "images": images, "annotations": found}))
        (tmp_path / "coco" / f"{split}2017").symlink_to((MINI / split).resolve())
    return tmp_path


@pytest.mark.slow
def test_an_unchanged_config_trains_and_evaluates(coco):
    """Two steps of one image from scratch, at the config's own sizes."""
    lines = train(
        coco,
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_2x_bcn_ws_1img.yaml",
        *("MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", "0", "DATALOADER.NUM_WORKERS", "0"),
        *("SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()"),
        *("SOLVER.IMS_PER_BATCH", "1", "SOLVER.REFERENCE_WORLD_SIZE", "0"),
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),  # untrained, it is sure of nothing
    )
    losses = [line["total_loss"] for line in lines if "total_loss" in line]
    assert losses and all(0 < loss < 50 for loss in losses)
    results = {key: value for line in lines for key, value in line.items()}
    # Next to nothing, and that is measured.
    assert 0 <= results["bbox/AP"] < 5 and 0 <= results["segm/AP"] < 5


@pytest.mark.slow
def test_a_detector_learns_twenty_pictures_by_heart(tmp_path):
    """Data, crowds, model, training and COCO's evaluation as a whole: a quarter of an hour."""
    if not os.getenv("WSBCN_OVERFIT"):
        pytest.skip("WSBCN_OVERFIT is not set")
    content = json.loads((MINI / "annotations" / "train.json").read_text())
    crowds = {a["image_id"] for a in content["annotations"] if a["iscrowd"]}
    others = {a["image_id"] for a in content["annotations"]} - crowds
    ids = {*sorted(others)[:18], *sorted(crowds)[:2]}
    images = [image for image in content["images"] if image["id"] in ids]
    found = [a for a in content["annotations"] if a["image_id"] in ids]
    twenty = tmp_path / "twenty.json"
    twenty.write_text(json.dumps({**content, "images": images, "annotations": found}))
    part = {"NAME": "twenty", "JSON": str(twenty), "IMAGES": str((MINI / "train").resolve())}
    lines = train(
        tmp_path,
        "nuclei/mask_rcnn_R_18_FPN_bcn_ws.yaml",
        *("DATASETS.COCO_SETS", str([part]), "MODEL.ROI_HEADS.NUM_CLASSES", "80"),
        *("DATASETS.TRAIN", "('twenty',)", "DATASETS.TEST", "('twenty',)"),
        *("INPUT.RANDOM_FLIP", "none", "SOLVER.BASE_LR", "0.02"),
        *("SOLVER.MAX_ITER", "2000", "SOLVER.STEPS", "(1600,)", "TEST.EVAL_PERIOD", "2000"),
        timeout=7200,
    )
    results = {key: value for line in lines for key, value in line.items()}
    assert results["bbox/AP"] > 60 and results["segm/AP"] > 60, results
