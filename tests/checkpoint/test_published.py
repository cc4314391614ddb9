"""Configs that reproduce the inference of published detectors, and the legacy box convention."""

import hashlib
import math
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.structures import Boxes

import wsbcn_d2.modeling.legacy  # noqa: F401  (registers)
from wsbcn_d2.checkpoint import CATALOG, LoadExpectation, WSBCNCheckpointer, convert, fetch
from wsbcn_d2.checkpoint.catalog import Entry, url_file_name
from wsbcn_d2.config import get_cfg

from . import ours
from . import source_models as src
from .parity import error

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "published"
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


def test_the_authors_anchor_table():
    """Widths and heights as maskrcnn-benchmark's generate_anchors gives them (checked there)."""
    table = {
        4: ((48, 24), (32, 32), (24, 48)),
        8: ((88, 48), (64, 64), (48, 96)),
        16: ((184, 96), (128, 128), (88, 176)),
        32: ((360, 176), (256, 256), (184, 368)),
        64: ((728, 368), (512, 512), (360, 720)),
    }
    generator, maps = anchors("authors_mask_rcnn_R_50_FPN_gn_ws")
    for stride, cells in zip(STRIDES, generator.cell_anchors, strict=True):
        sides = [tuple(side) for side in (cells[:, 2:] - cells[:, :2]).tolist()]
        assert sides == [tuple(map(float, side)) for side in table[stride]]
    for stride, boxes, features in zip(STRIDES, generator(maps), maps, strict=True):
        # There: inclusive boxes around the centre of the window [0, stride - 1], then shifts.
        expected = []
        centre = 0.5 * (stride - 1)
        for y in range(features.shape[2]):
            for x in range(features.shape[3]):
                for w, h in table[stride]:
                    box = (-(w - 1) / 2, -(h - 1) / 2, (w - 1) / 2, (h - 1) / 2)
                    shift = (x * stride + centre, y * stride + centre) * 2
                    x1, y1, x2, y2 = (a + b for a, b in zip(box, shift, strict=True))
                    expected.append((x1, y1, x2 + 1, y2 + 1))
        assert torch.equal(boxes.tensor, torch.tensor(expected))


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


def legacy_roi_align(features, box, size):
    """maskrcnn-benchmark's ROIAlign of an inclusive box, 2 x 2 samples, one sample at a time."""
    height, width = features.shape[1:]
    x1, y1, x2, y2 = box
    bin_w, bin_h = max(x2 - x1, 1.0) / size, max(y2 - y1, 1.0) / size
    out = torch.zeros(features.shape[0], size, size, dtype=features.dtype)

    def at(y, x):
        if y < -1 or y > height or x < -1 or x > width:
            return 0.0
        y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        dy, dx = y - top, x - left
        upper = features[:, top, left] * (1 - dx) + features[:, top, right] * dx
        lower = features[:, bottom, left] * (1 - dx) + features[:, bottom, right] * dx
        return upper * (1 - dy) + lower * dy

    for i in range(size):
        for j in range(size):
            for a in (0.25, 0.75):
                for b in (0.25, 0.75):
                    out[:, i, j] += at(y1 + (i + a) * bin_h, x1 + (j + b) * bin_w) / 4
    return out


@pytest.mark.parametrize("task, size", [("box", 7), ("mask", 14)])
def test_legacy_pooling(task, size):
    with torch.device("meta"):
        heads = ours.Parts(config("authors_mask_rcnn_R_50_FPN_gn_ws")).roi_heads
    pooler = getattr(heads, f"{task}_pooler")
    gen = torch.Generator().manual_seed(0)
    levels = [
        torch.randn(1, 3, 256 // s, 320 // s, generator=gen, dtype=torch.float64)
        for s in (4, 8, 16, 32)
    ]
    # Inclusive boxes, as the source has them: one for each of P2..P4, a tiny one, one outside.
    inclusive = torch.tensor(
        [
            [10.0, 20, 59, 83],
            [5, 7, 200, 133],
            [0, 0, 299, 249],
            [40, 40, 40.5, 41],
            [-30, 200, 60, 290],
        ],
        dtype=torch.float64,
    )
    ours_ = inclusive + torch.tensor([0, 0, 1, 1])
    got = pooler(levels, [Boxes(ours_.clone())])
    for box, pooled in zip(inclusive, got, strict=True):
        area = float((box[2] - box[0] + 1) * (box[3] - box[1] + 1))
        level = min(max(math.floor(4 + math.log2(math.sqrt(area) / 224 + 1e-6)), 2), 5)
        scaled = (box / 2**level).tolist()
        want = legacy_roi_align(levels[level - 2][0], scaled, size)
        assert error(pooled, want) < 1e-6  # Boxes are float32
    stock = ours.config(formula="unbiased_std")
    with torch.device("meta"):
        plain = getattr(ours.Parts(stock).roi_heads, f"{task}_pooler")
    assert error(plain(levels, [Boxes(ours_)]), got) > 1e-2, "the stock pooler is another one"


def shapes(kind, cfg):
    own = dict(mmdet=(dict(prefix="backbone.", norm_name="gn"), src.mmdet_heads(2)))
    own["authors"] = (dict(prefix="backbone.body.", stem="stem."), src.MRB)
    names, heads = own[kind]
    resnets = cfg.MODEL.RESNETS
    net = src.Net(resnets.DEPTH, resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP, **names)
    yield from src.resnet_entries(net, classifier=False)
    yield from src.head_entries(heads, cfg.MODEL.MASK_ON)


@pytest.mark.parametrize("name", LEAVES)
def test_each_config_fits_its_checkpoint(name):
    kind = name.partition("_")[0]
    cfg = config(name)
    with torch.device("meta"):
        state = {n: torch.empty(s) for n, s in shapes(kind, cfg)}
        model = ours.Parts(cfg)
    expected = LoadExpectation.from_cfg(cfg)
    if kind == "mmdet":
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
    assert len(LEAVES) == 12 + 8
    used = {config(name).MODEL.WEIGHTS for name in LEAVES if name.startswith("mmdet")}
    assert used == {f"wsbcn://{e.name}" for e in CATALOG.values() if e.detector}


@pytest.mark.slow
def test_a_published_detector_from_its_name_to_boxes(tmp_path, monkeypatch, caplog):
    """Config, catalog name, offline file, conversion, loading, inference."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WSBCN_CHECKPOINTS", str(tmp_path))
    cfg = config("mmdet_faster_rcnn_R_50_FPN_gn_ws_1x")
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0  # random class scores are all near 1 / 81
    state = src.random_state(shapes("mmdet", cfg), dtype=torch.float32)
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
