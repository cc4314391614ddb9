"""The predictor: what the model predicts, from safe and fitting weights; pictures of it."""

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from wsbcn_d2.checkpoint import CheckpointError, WSBCNCheckpointer
from wsbcn_d2.predictor import draw_predictions


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
