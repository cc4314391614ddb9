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
    config = ROOT / "configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_2x_bcn_ws_1img.yaml"
    command = [sys.executable, str(ROOT / "tools" / "train_net.py"), "--config-file", str(config)]
    command += ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0"]
    command += ["SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()"]
    command += ["SOLVER.IMS_PER_BATCH", "1", "SOLVER.REFERENCE_WORLD_SIZE", "0"]
    command += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]  # untrained, it is sure of nothing
    command += ["MODEL.BACKBONE.FREEZE_AT", "0", "OUTPUT_DIR", str(coco / "out"), "SEED", "1"]
    env = {**os.environ, "DETECTRON2_DATASETS": str(coco), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(x) for x in (coco / "out" / "metrics.json").read_text().splitlines()]
    losses = [line["total_loss"] for line in lines if "total_loss" in line]
    assert losses and all(0 < loss < 50 for loss in losses)
    results = {key: value for line in lines for key, value in line.items()}
    # Next to nothing, and that is measured.
    assert 0 <= results["bbox/AP"] < 5 and 0 <= results["segm/AP"] < 5
