"""Metrics and curves of a run."""

import json

import numpy as np
from PIL import Image

from wsbcn_d2.engine.curves import plot_curves, read_metrics


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
