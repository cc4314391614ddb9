"""Metrics and curves of a run."""

import json

import numpy as np
from matplotlib.figure import Figure
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


def test_what_is_drawn_on_which_axes(monkeypatch):
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: saved.append((figure, path)))
    metrics = {
        "total_loss": [(19, 3.0), (39, 2.0)],
        "loss_mask": [(19, 1.0), (39, 0.5)],
        "bbox/AP": [(39, 5.0), (79, 7.0)],
        "segm/AP": [(39, 4.0)],
        **{name: [(39, 99.0)] for name in ("bbox/AP50", "bbox/APs", "lr", "time", "data_time")},
    }
    assert plot_curves(metrics, "a.png", "a title") == "a.png"
    ((figure, path),) = saved
    assert path == "a.png" and figure.get_suptitle() == "a title"
    losses, aps = figure.axes
    drawn = [
        {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
        for axes in (losses, aps)
    ]
    assert drawn == [
        {name: metrics[name] for name in ("loss_mask", "total_loss")},
        {name: metrics[name] for name in ("bbox/AP", "segm/AP")},
    ]
    assert [axes.get_xlabel() for axes in figure.axes] == ["iteration"] * 2
    assert [axes.get_ylabel() for axes in figure.axes] == ["training loss", "AP on the test set"]
    for axes, names in zip(figure.axes, drawn, strict=True):
        assert [text.get_text() for text in axes.get_legend().get_texts()] == list(names)


def test_curves_are_drawn_where_there_is_something(tmp_path):
    metrics = {"total_loss": [(0, 2.0), (9, 1.0)], "bbox/AP": [(9, 5.0)], "lr": [(0, 0.1)]}
    picture = np.asarray(Image.open(plot_curves(metrics, str(tmp_path / "a.png"), "title")))
    empty = np.asarray(Image.open(plot_curves({}, str(tmp_path / "b.png"))))
    assert picture.shape == empty.shape
    assert (picture != empty).any()
