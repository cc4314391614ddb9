"""Configs that reproduce the inference of published detectors."""

import hashlib
import math
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import build_anchor_generator

from wsbcn_d2.checkpoint import CATALOG, LoadExpectation, WSBCNCheckpointer, convert, fetch
from wsbcn_d2.checkpoint.catalog.entries import Entry, url_file_name
from wsbcn_d2.config import get_cfg

from .. import ours
from .. import source_models as src
from ..parity import error

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "published"
LEAVES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith("Base"))
STRIDES = (4, 8, 16, 32, 64)


def config(name) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / f"{name}.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def anchors(name):
    generator = build_anchor_generator(config(name), [ShapeSpec(stride=s) for s in STRIDES])
    return generator, [torch.zeros(1, 1, 128 // s, 192 // s) for s in STRIDES]


def test_mmdetections_anchors_are_detectron2s():
    """mmdetection: w = 8 stride / sqrt(ratio), around the corner of the cell."""
    generator, maps = anchors("mmdet_mask_rcnn_R_50_FPN_gn_ws_2x")
    for stride, boxes, features in zip(STRIDES, generator(maps), maps, strict=True):
        expected = []
        for y in range(features.shape[2]):
            for x in range(features.shape[3]):
                for ratio in (0.5, 1.0, 2.0):
                    w, h = (8 * stride / math.sqrt(ratio), 8 * stride * math.sqrt(ratio))
                    cx, cy = x * stride, y * stride
                    expected.append((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
        assert torch.allclose(boxes.tensor, torch.tensor(expected), rtol=0, atol=1e-4)


def shapes(cfg):
    resnets = cfg.MODEL.RESNETS
    names = dict(prefix="backbone.", norm_name="gn")
    net = src.Net(resnets.DEPTH, resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP, **names)
    yield from src.resnet_entries(net, classifier=False)
    yield from src.head_entries(src.mmdet_heads(2), cfg.MODEL.MASK_ON)


@pytest.mark.rotated(3)
@pytest.mark.parametrize("name", LEAVES)
def test_each_config_fits_its_checkpoint(name):
    cfg = config(name)
    with torch.device("meta"):
        state = {n: torch.empty(s) for n, s in shapes(cfg)}
        model = ours.Parts(cfg)
    expected = LoadExpectation.from_model(model, cfg)
    entry = CATALOG[cfg.MODEL.WEIGHTS.removeprefix("wsbcn://")]
    assert entry.detector and entry.formula == expected.ws_formula
    assert entry.pixels.pixel_mean == expected.pixel_mean
    assert name.split("_ws_")[1] in entry.name and ("mask_" in entry.name) == cfg.MODEL.MASK_ON
    assert ("x" in entry.name.split("_")[2]) == (cfg.MODEL.RESNETS.NUM_GROUPS == 32)
    assert str(cfg.MODEL.RESNETS.DEPTH) in entry.name.split("_")[2]
    # meta tensors hold no data; the converter looks at values only to find NaN
    state = {n: torch.empty_like(v, device="cpu") for n, v in state.items()}
    converted, report = convert(state)
    assert {k: v.shape for k, v in converted.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    meta = report.metadata
    assert (meta.ws_formula, meta.norm) == (expected.ws_formula, expected.norm)
    assert (meta.input_format, meta.pixel_mean) == (expected.input_format, expected.pixel_mean)
    assert meta.pixel_std == expected.pixel_std


def test_the_whole_set_is_there():
    assert len(LEAVES) == 12
    used = {config(name).MODEL.WEIGHTS for name in LEAVES}
    assert used == {f"wsbcn://{e.name}" for e in CATALOG.values() if e.detector}


@pytest.mark.slow
def test_a_published_detector_from_its_name_to_boxes(tmp_path, monkeypatch, caplog):
    """Config, catalog name, offline file, conversion, loading, inference."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WSBCN_CHECKPOINTS", str(tmp_path))
    cfg = config("mmdet_faster_rcnn_R_50_FPN_gn_ws_1x")
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0  # random class scores are all near 1 / 81
    state = src.random_state(shapes(cfg), dtype=torch.float32)
    file = tmp_path / "x.pth"
    torch.save({"meta": {"CLASSES": ("a",)}, "state_dict": state}, file)
    name = cfg.MODEL.WEIGHTS.removeprefix("wsbcn://")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    urls = (CATALOG[name].urls[0].replace("613d9fe2", digest),)
    monkeypatch.setitem(CATALOG, name, Entry(**{**vars(CATALOG[name]), "urls": urls}))
    file.rename(tmp_path / url_file_name(urls[0]))

    model = build_model(cfg).eval()
    WSBCNCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    image = torch.randint(0, 256, (3, 128, 160), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model([{"image": image.float(), "height": 128, "width": 160}])[0]["instances"]
        assert len(found) == 100 and torch.isfinite(found.pred_boxes.tensor).all()
        # The same picture through the source: RGB mean and std, then its own network.
        net, heads = src.Net(prefix="backbone.", norm_name="gn"), src.mmdet_heads(2)
        state = {n: v.double() if v.is_floating_point() else v for n, v in state.items()}
        mean = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
        std = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
        x = ((image.double() - mean) / std)[None]
        features = src.resnet_forward(state, net, x)
        boxes = torch.randn(1, 256, 7, 7, dtype=torch.float64)
        want = src.detector_forward(state, heads, features, boxes, None)
        batch = model.preprocess_image([{"image": image}])
        got = model.backbone.double()(batch.tensor.double())
    assert error(batch.tensor, x) < 1e-6
    assert error(got["p2"], want["p2"]) < 1e-5 and error(got["p5"], want["p5"]) < 1e-5
    assert fetch(name).endswith(".pth")
