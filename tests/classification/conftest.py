"""A classification view of the tiny shapes set."""

import pytest
from conftest import ROOT
from detectron2.data import DatasetCatalog, MetadataCatalog

from wsbcn_d2 import get_cfg
from wsbcn_d2.data.shapes_crops import register_shapes_crops


@pytest.fixture(scope="session")
def tiny_crops(tiny_shapes):
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
