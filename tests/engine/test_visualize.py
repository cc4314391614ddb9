"""Pictures and curves of a run."""

import json

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from wsbcn_d2.checkpoint import CheckpointError, WSBCNCheckpointer
from wsbcn_d2.engine.visualize import draw_predictions, plot_curves, read_metrics


def test_metrics_of_a_killed_and_resumed_run(tmp_path):
    path = tmp_path / "metrics.json"
    rows = [
        {"iteration": 19, "total_loss": 3.0},
        {"iteration": 39, "total_loss": 2.0, "segm/AP": 1.0},
        {"iteration": 39, "total_loss": 1.5},  # run again after a resume
        {"iteration": 59, "total_loss": 1.0},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"iteration": 79, "total_l')
    metrics = read_metrics(str(path))
    assert metrics["total_loss"] == [(19, 3.0), (39, 1.5), (59, 1.0)]
    assert metrics["segm/AP"] == [(39, 1.0)]


def test_curves_are_drawn_where_there_is_something(tmp_path):
    metrics = {"total_loss": [(0, 2.0), (9, 1.0)], "bbox/AP": [(9, 5.0)], "lr": [(0, 0.1)]}
    picture = np.asarray(Image.open(plot_curves(metrics, str(tmp_path / "a.png"), "title")))
    empty = np.asarray(Image.open(plot_curves({}, str(tmp_path / "b.png"))))
    assert picture.shape == empty.shape
    assert (picture != empty).any()


def test_predictions_beside_ground_truth(tmp_path, tiny_cfg, tiny_shapes):
    cfg = tiny_cfg("DATASETS.TEST", (tiny_shapes["val"],))
    torch.manual_seed(0)
    checkpointer = WSBCNCheckpointer(build_model(cfg), str(tmp_path))
    checkpointer.save("model")
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    paths = draw_predictions(cfg, str(tmp_path / "out"), num_images=2, min_score=0.0, scale=2)
    assert len(paths) == 2
    for path in paths:
        image = np.asarray(Image.open(path))
        half = (image.shape[1] - 8) // 2
        # The same photograph twice, with different drawings on it.
        assert image.shape[1] == 2 * half + 8
        assert (image[:, :half] != image[:, half + 8 :]).any()


def test_weights_that_do_not_fit_are_not_drawn(tmp_path, tiny_cfg, tiny_shapes):
    cfg = tiny_cfg("DATASETS.TEST", (tiny_shapes["val"],))
    cfg.defrost()
    torch.save({"model": {"nothing.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="other.pth"):
        draw_predictions(cfg, str(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.png"))
