"""The predictor: what the model predicts, from safe and fitting weights; pictures of it."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from detectron2.config import LazyCall
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import Instances
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from wsbcn_d2 import Predictor, get_cfg, predictor
from wsbcn_d2.checkpoint import CheckpointError, WSBCNCheckpointer
from wsbcn_d2.config import UsageError
from wsbcn_d2.data import DataError
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


def test_what_is_drawn_and_of_which_pictures(tmp_path, tiny_cfg, tiny_shapes, monkeypatch):
    """Of evenly spaced ones, what has a score of a half at least."""
    cfg = tiny_cfg("DATASETS.TEST", (tiny_shapes["val"],))
    drawn = []

    class Fake:
        metadata = MetadataCatalog.get(tiny_shapes["val"])

        def __init__(self, cfg):
            pass

        def read(self, path):
            return np.asarray(Image.open(path))[:, :, ::-1]

        def __call__(self, image):
            found = Instances(image.shape[:2])
            found.scores = torch.tensor([0.9, 0.5, 0.499, 0.1])
            return {"instances": found}

        def draw(self, image, predictions, *, scale):
            drawn.append(predictions["instances"].scores.tolist())
            size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
            picture = np.asarray(Image.new("RGB", size, (1, 2, 3)))
            return SimpleNamespace(get_image=lambda: picture)

    monkeypatch.setattr(predictor, "Predictor", Fake)
    paths = draw_predictions(cfg, str(tmp_path), num_images=3)
    assert drawn == [pytest.approx([0.9, 0.5])] * 3
    records = DatasetCatalog.get(tiny_shapes["val"])
    assert [Path(p).stem for p in paths] == [Path(records[i]["file_name"]).stem for i in (0, 1, 3)]
    for path, i in zip(paths, (0, 1, 3), strict=True):
        image = np.asarray(Image.open(path))
        height, width = 3 * records[i]["height"], 3 * records[i]["width"]
        assert image.shape == (height, 2 * width + 8, 3)
        assert (image[:, width : width + 8] == 255).all()
        assert (image[:, width + 8 :] == (1, 2, 3)).all()  # the prediction is on the right
    assert len(draw_predictions(cfg, str(tmp_path))) == 4  # no more than there are


def test_a_threshold_is_every_parts(tmp_path, monkeypatch):
    class Part(nn.Module):
        def __init__(self, name):
            super().__init__()
            setattr(self, name, 0.05)

    names = ("test_score_thresh", "combine_instances_score_thresh", "nms_thresh")

    def init(self, cfg, *, fold):
        self.model = nn.Sequential(*map(Part, names))
        self.fold = fold

    monkeypatch.setattr(Predictor, "__init__", init)
    (tmp_path / "model.pth").touch()
    (tmp_path / "config.yaml").write_text("SEED: 3\n")
    for threshold, expected in (
        (0.25, [0.25, 0.25, 0.05]),
        (0.0, [0, 0, 0.05]),
        (None, [0.05] * 3),
    ):
        found = Predictor.from_checkpoint(tmp_path / "model.pth", threshold=threshold, fold=True)
        values = [getattr(p, n) for p, n in zip(found.model, names, strict=True)]
        assert values == expected and found.fold is True


@pytest.mark.parametrize("image_format, expected", [("L", [[[76]]]), ("BGR", [[[0, 0, 255]]])])
def test_red_is_red_to_a_model_of_one_channel(image_format, expected, monkeypatch):
    """0.299 of 255: the arrays that a predictor is given are BGR."""
    monkeypatch.setattr(DefaultPredictor, "__call__", lambda self, image: image)
    found = Predictor.__new__(Predictor)
    found.cfg = get_cfg()
    found.cfg.INPUT.FORMAT = image_format
    assert found(np.array([[[0, 0, 255]]], np.uint8)).tolist() == expected


@pytest.mark.parametrize(
    "kinds, drawn",
    [
        (["panoptic_seg", "sem_seg", "instances"], ["panoptic"]),
        (["sem_seg", "instances"], ["sem_seg", "instances"]),
        (["sem_seg"], ["sem_seg"]),
        (["instances"], ["instances"]),
        ([], []),
    ],
)
def test_every_kind_of_prediction_is_drawn(kinds, drawn, monkeypatch):
    from detectron2.utils import visualizer

    seen, scores = [], torch.rand(5, 4, 6)

    class Drawing:
        output = "picture"

        def __init__(self, image, metadata, *, scale):
            assert image[0, 0].tolist() == [3, 2, 1] and (metadata, scale) == ("names", 2.0)

        def draw_panoptic_seg_predictions(self, segments, info):
            seen.append("panoptic")
            assert (segments.tolist(), info) == ([1], ["info"])
            return "drawn"

        def draw_sem_seg(self, classes):
            seen.append("sem_seg")
            assert torch.equal(classes, scores.argmax(0))
            return "drawn"

        def draw_instance_predictions(self, found):
            seen.append("instances")
            assert found.scores.tolist() == [0.5]
            return "drawn"

    monkeypatch.setattr(visualizer, "Visualizer", Drawing)
    predictions = {
        "panoptic_seg": (torch.tensor([1]), ["info"]),
        "sem_seg": scores,
        "instances": Instances((4, 6), scores=torch.tensor([0.5])),
    }
    found = Predictor.__new__(Predictor)
    found.metadata = "names"
    image = np.full((4, 6, 3), (1, 2, 3), np.uint8)
    result = found.draw(image, {kind: predictions[kind] for kind in kinds}, scale=2.0)
    assert seen == drawn and result == ("drawn" if drawn else "picture")


@pytest.mark.parametrize("name", ["model.pth", 'a b\'s "m".pth', "a=b,{c}.pth"])
def test_weights_of_any_name_in_a_python_config(name, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(Predictor, "__init__", lambda self, cfg, *, fold: asked.append(cfg))
    (tmp_path / name).touch()
    config = ROOT / "configs/lazy/COCO-Detection/retinanet_R_50_FPN_1x_gn_ws_1img.py"
    opts = ["train.seed=5"]
    Predictor.from_checkpoint(tmp_path / name, config_file=config, opts=opts)
    ((cfg),) = asked
    assert (cfg.train.init_checkpoint, cfg.train.seed) == (str(tmp_path / name), 5)


def test_names_of_classes_are_by_their_ids(tmp_path):
    path = tmp_path / "a.json"
    classes = [{"id": 7, "name": "late"}, {"id": 2, "name": "early"}, {"id": 5, "name": "mid"}]
    path.write_text(json.dumps({"categories": classes}))
    metadata = Metadata(name="x", json_file=str(path))
    predictor._know_classes(metadata)
    assert metadata.thing_dataset_id_to_contiguous_id == {2: 0, 5: 1, 7: 2}
    assert metadata.thing_classes == ["early", "mid", "late"]


def test_a_python_config_predicts_in_evaluation_and_in_its_own_order(tmp_path, tiny_shapes):
    cfg = OmegaConf.create(
        {
            "model": LazyCall(torch.nn.Dropout)(p=0.5),
            "train": {"device": "cpu", "init_checkpoint": ""},
            "dataloader": {
                "test": {
                    "dataset": {"names": tiny_shapes["val"]},
                    "mapper": {
                        "image_format": "RGB",
                        "augmentations": [LazyCall(T.ResizeShortestEdge)(short_edge_length=9)],
                    },
                }
            },
        }
    )
    found = Predictor(cfg)
    assert not found.model.training and found.input_format == "RGB"
    assert found.metadata.name == tiny_shapes["val"] and found.picture_range == []
    assert found.aug.get_transform(np.zeros((18, 36, 3), np.uint8)).apply_image(
        np.zeros((18, 36, 3), np.uint8)
    ).shape == (9, 18, 3)


def test_weights_that_do_not_fit_are_not_drawn(tmp_path, tiny_cfg, tiny_shapes):
    cfg = tiny_cfg("DATASETS.TEST", (tiny_shapes["val"],))
    cfg.defrost()
    torch.save({"model": {"nothing.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="other.pth"):
        draw_predictions(cfg, str(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize(
    "shape", [(4, 6), (4, 6, 1), (4, 6, 4), (0, 6, 3), (4, 0, 3), (1, 4, 6, 3)]
)
def test_what_is_no_picture_is_refused(shape):
    found = Predictor.__new__(Predictor)
    message = f"a picture has shape (height, width, 3), not {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        found(np.zeros(shape, np.uint8))


def test_pictures_are_read_as_bgr_with_the_models_range(tmp_path):
    found = Predictor.__new__(Predictor)
    found.picture_range = []
    Image.new("RGB", (3, 2), (10, 20, 30)).save(tmp_path / "a.png")
    assert found.read(tmp_path / "a.png")[0, 0].tolist() == [30, 20, 10]
    Image.fromarray(np.full((2, 3), 50, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match="deep.png has more than 8 bits"):
        found.read(tmp_path / "deep.png")
    found.picture_range = [0, 100]
    assert found.read(tmp_path / "deep.png")[0, 0].tolist() == [128] * 3


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "has no config.yaml beside it: say which with --config-file"),
        ("model: {}\n", "is of a Python config, which is code: if you trust it, --config-file "),
        ("_BASE_: x.yaml\n", "is no whole config, it has a _BASE_: name it by --config-file"),
        ("- 1\n", "config file .*holds no KEY: value lines"),
    ],
)
def test_the_config_beside_a_checkpoint(content, message, tmp_path):
    (tmp_path / "model.pth").touch()
    if content:
        (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UsageError, match=message) as error:
        Predictor.from_checkpoint(tmp_path / "model.pth")
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match=r"^checkpoint '.*absent\.pth' not found: check its path$"):
        Predictor.from_checkpoint(tmp_path / "absent.pth")
    with pytest.raises(UsageError, match="has no config.yaml beside it"):
        Predictor.from_checkpoint("wsbcn://any")


def test_a_python_configs_range_and_mapper_are_the_inner_ones(tmp_path):
    inner = {"image_format": "L", "augmentations": []}
    cfg = OmegaConf.create(
        {
            "model": LazyCall(torch.nn.Identity)(),
            "train": {"device": "cpu", "init_checkpoint": ""},
            "dataloader": {"test": {"mapper": {"limits": [0, 9], "mapper": inner}}},
        }
    )
    found = Predictor(cfg)
    assert (found.picture_range, found.input_format) == ([0, 9], "L")
    assert found.metadata.name == "none" and len(found.aug.augs) == 0
