"""Fixtures that several test files share; which tests have their turn."""

import collections
import importlib.util
import logging
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BitMasks, Boxes, Instances

from wsbcn_d2 import data, get_cfg
from wsbcn_d2.data.shapes import register_shapes_crops

ROOT = Path(__file__).resolve().parents[1]

# A Mask R-CNN that takes a step in a tenth of a second: R-18, 32 channels everywhere else.
TINY = {
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 32,
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 20,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 10,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 1,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 32,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 32,
    "DATALOADER.NUM_WORKERS": 0,
    "TEST.DETECTIONS_PER_IMAGE": 5,
    "MODEL.DEVICE": "cpu",
}
STOCK_TINY = [str(part) for pair in TINY.items() for part in pair]
# So that a step changes everything that it can.
TINY = [*STOCK_TINY, "MODEL.BCN.UPDATE_RATE", "0.01"]


SEED = int(os.environ.get("WSBCN_TEST_SEED", "0"))


def pytest_addoption(parser):
    group = parser.getgroup("wsbcn_d2")
    group.addoption("--all", action="store_true", help="every test, whoever's turn it is")
    group.addoption(
        "--rotation", type=int, metavar="N",
        help="whose turn it is among the tests marked rotated; the number of today if not given",
    )  # fmt: skip


def pytest_configure(config):
    if config.option.rotation is None:  # once: the processes of xdist are told
        config.option.rotation = int(time.time() / 86400)


def pytest_collection_modifyitems(config, items):
    """Of a test with many parameters that is marked rotated(n), every n-th has its turn."""
    if config.option.all or any("::" in str(arg) for arg in config.args):
        return
    seen, left = collections.Counter(), []
    for item in items:
        if mark := item.get_closest_marker("rotated"):
            test = item.path, item.originalname
            if (seen[test] + config.option.rotation) % mark.args[0]:
                left.append(item)
            seen[test] += 1
    if left:
        items[:] = [item for item in items if item not in set(left)]
        config.hook.pytest_deselected(items=left)


def pytest_terminal_summary(terminalreporter, config):
    if not config.option.all:
        terminalreporter.write_line(
            f"rotation {config.option.rotation}: --rotation {config.option.rotation} runs the "
            "same tests again, --all runs every one"
        )


def kept_for_backward(run):
    """Address to bytes of the distinct tensors that autograd keeps of ``run()``."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    assert y.requires_grad
    return kept


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(SEED)
    np.random.seed(SEED)
    random.seed(SEED)


@pytest.fixture(autouse=True)
def loggers_as_they_were():
    """What a test's run has set up to log to does not outlive it: its streams do not either."""

    def handlers():
        loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
        return {x: list(x.handlers) for x in loggers if isinstance(x, logging.Logger)}

    before = handlers()
    yield
    for logger, now in handlers().items():
        for handler in now:
            if handler not in before.get(logger, []):
                logger.removeHandler(handler)


@pytest.fixture(scope="session")
def tiny_shapes(tmp_path_factory):
    """Names of two splits of a few small shapes images."""
    root = tmp_path_factory.mktemp("shapes")
    names = {"train": "test_shapes_tiny_train", "val": "test_shapes_tiny_val"}
    for split, name in names.items():
        data.register_shapes_split(name, root, split, num_images=4, image_size=(64, 80))
        DatasetCatalog.get(name)  # renders the images
    yield names
    for name in names.values():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def tiny_options(tiny_shapes, tmp_path):
    """``KEY VALUE`` overrides under which a shapes config trains in seconds."""
    return [
        *TINY,
        *("DATASETS.TRAIN", f"('{tiny_shapes['train']}',)"),
        *("DATASETS.TEST", f"('{tiny_shapes['val']}',)"),
        *("OUTPUT_DIR", str(tmp_path / "output")),
        *("SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "()", "TEST.EVAL_PERIOD", "0"),
        *("SOLVER.CHECKPOINT_PERIOD", "100"),
    ]


@pytest.fixture
def tiny_cfg():
    """Makes the config of a tiny WS + BCN Mask R-CNN: ``tiny_cfg("KEY", value, ...)``."""

    def make(*overrides):
        cfg = get_cfg()
        cfg.merge_from_file(str(ROOT / "configs" / "shapes" / "mask_rcnn_R_18_FPN_bcn_ws.yaml"))
        cfg.merge_from_list([*TINY, *overrides])
        return cfg

    return make


@pytest.fixture
def r50_cfg():
    """Makes the config of the full-size WS + BCN Mask R-CNN, for the meta device."""

    def make(*overrides):
        cfg = get_cfg()
        cfg.merge_from_file(str(ROOT / "configs" / "Base-Mask-RCNN-BCN-WS.yaml"))
        cfg.merge_from_list(["MODEL.DEVICE", "meta", *overrides])
        return cfg

    return make


@pytest.fixture
def make_batch():
    """Makes one mapped training image, with two objects, as a data loader would."""

    def make(height=96, width=96, num_classes=6):
        masks = torch.zeros(2, height, width, dtype=torch.bool)
        masks[0, 8:40, 10:50] = True
        masks[1, 40:80, 30:90] = True
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[10.0, 8, 50, 40], [30, 40, 90, 80]]))
        instances.gt_classes = torch.tensor([0, num_classes - 1])
        instances.gt_masks = BitMasks(masks)
        image = torch.randint(0, 256, (3, height, width)).to(torch.uint8)
        return [
            {
                "image": image,
                "height": height,
                "width": width,
                "instances": instances,
                "sem_seg": masks[0].long(),
                "label": 1,  # for classifiers
            }
        ]

    return make


@pytest.fixture(scope="session")
def train_net():
    """``tools/train_net.py`` as a module."""
    spec = importlib.util.spec_from_file_location("train_net", ROOT / "tools" / "train_net.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_crops(tiny_shapes):
    """Names of a classification view of the tiny shapes set."""
    names = {split: f"{name}_crops" for split, name in tiny_shapes.items()}
    for split, name in names.items():
        register_shapes_crops(name, tiny_shapes[split])
    yield names
    for name in names.values():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def crops_options(tiny_crops, tmp_path):
    """``KEY VALUE`` overrides under which a shapes classifier trains in seconds."""
    return [
        *("DATASETS.TRAIN", f"('{tiny_crops['train']}',)"),
        *("DATASETS.TEST", f"('{tiny_crops['val']}',)"),
        *("INPUT.CLASSIFICATION.SIZE", "32", "INPUT.CLASSIFICATION.RESIZE_TEST", "32"),
        *("SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "0"),
        *("DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(tmp_path / "classifier")),
        *("MODEL.DEVICE", "cpu"),
        *("MODEL.BACKBONE.NAME", "build_ws_cifar_resnet_backbone", "MODEL.RESNETS.DEPTH", "8"),
        *("MODEL.RESNETS.STEM_OUT_CHANNELS", "32", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32"),
    ]


@pytest.fixture
def classifier_cfg():
    """Makes the config of the shapes classifier: ``classifier_cfg("KEY", value, ...)``."""

    def make(*overrides, name="shapes/classifier_R_18_bcn_ws"):
        cfg = get_cfg()
        cfg.merge_from_file(str(ROOT / "configs" / f"{name}.yaml"))
        cfg.merge_from_list(["MODEL.DEVICE", "cpu", *overrides])
        return cfg

    return make
