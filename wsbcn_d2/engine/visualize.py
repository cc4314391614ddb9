"""Pictures of a run: predictions beside ground truth, and curves over iterations."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.utils.visualizer import Visualizer
from PIL import Image

from ..checkpoint import LoadExpectation, WSBCNCheckpointer

__all__ = ["draw_predictions", "plot_curves", "read_metrics"]


def draw_predictions(
    cfg: CfgNode, output_dir: str, *, num_images: int = 6, min_score: float = 0.5, scale: float = 3
) -> list[str]:
    """Draw ground truth (left) and predictions (right) of evenly spaced test images.

    Args:
        cfg: its ``MODEL.WEIGHTS`` is the model, its first ``DATASETS.TEST`` the images.
        output_dir: where the PNG files go; made if absent.
        num_images: how many.
        min_score: predictions below it are not drawn.
        scale: enlargement of the picture.

    Returns:
        list[str]: the paths written.
    """
    name = cfg.DATASETS.TEST[0]
    metadata = MetadataCatalog.get(name)
    records = DatasetCatalog.get(name)
    predictor = _predictor(cfg)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    picks = np.linspace(0, len(records) - 1, min(num_images, len(records))).astype(int)
    paths = []
    for record in [records[i] for i in picks]:
        image = read_image(record["file_name"], format="BGR")
        predicted = predictor(image)["instances"].to("cpu")
        predicted = predicted[predicted.scores >= min_score]
        rgb = image[:, :, ::-1]
        truth = Visualizer(rgb, metadata, scale=scale).draw_dataset_dict(record)
        found = Visualizer(rgb, metadata, scale=scale).draw_instance_predictions(predicted)
        gap = np.full((truth.get_image().shape[0], 8, 3), 255, np.uint8)
        both = np.concatenate([truth.get_image(), gap, found.get_image()], axis=1)
        path = folder / f"{Path(record['file_name']).stem}.png"
        Image.fromarray(both).save(path)
        paths.append(str(path))
    return paths


def _predictor(cfg: CfgNode) -> DefaultPredictor:
    # Its own loading would unpickle a foreign file, and take weights that do not fit.
    unloaded = cfg.clone()
    unloaded.defrost()
    unloaded.MODEL.WEIGHTS = ""
    predictor = DefaultPredictor(unloaded)
    expected = LoadExpectation.from_cfg(cfg)
    WSBCNCheckpointer(predictor.model, expected=expected).load(cfg.MODEL.WEIGHTS)
    return predictor


def read_metrics(path: str) -> dict[str, list[tuple[int, float]]]:
    """Read Detectron2's ``metrics.json``.

    Args:
        path: one JSON object per line; a last line cut short by a kill is left out.

    Returns:
        dict: metric name to (iteration, value) pairs in order. After a resume, the values of
        iterations that were run again replace the earlier ones.
    """
    series: dict[str, dict[int, float]] = defaultdict(dict)
    for line in Path(path).read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        iteration = row.pop("iteration")
        for name, value in row.items():
            series[name][iteration] = value
    return {name: sorted(values.items()) for name, values in series.items()}


def plot_curves(metrics: dict[str, list[tuple[int, float]]], path: str, title: str = "") -> str:
    """Plot the training losses and the test APs of one run.

    Args:
        metrics: as returned by :func:`read_metrics`.
        path: PNG file to write.
        title: above the plot.

    Returns:
        str: ``path``.
    """
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, aps = figure.subplots(1, 2)
    for name in sorted(metrics):
        if "loss" in name:
            losses.plot(*zip(*metrics[name], strict=True), label=name, linewidth=1)
        elif name.endswith("/AP"):
            aps.plot(*zip(*metrics[name], strict=True), "o-", label=name)
    for axes, label in ((losses, "training loss"), (aps, "AP on the test set")):
        axes.set(xlabel="iteration", ylabel=label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    return path
