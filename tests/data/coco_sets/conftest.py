"""Names that are gone after a test, and training on sets by the command."""

import sys

import pytest
from conftest import TINY
from detectron2.data import DatasetCatalog, MetadataCatalog

from .sets import CONFIG


@pytest.fixture(autouse=True)
def own_names(tmp_path, monkeypatch):
    """What a test registers is gone after it; what is remembered, is remembered elsewhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def command(train_net, tmp_path, monkeypatch, capsys):
    """Runs tools/train_net.py on sets; gives exit code and the lines of its errors."""

    def call(train, test, *options):
        names = {entry["NAME"] for entry in train}, {entry["NAME"] for entry in test}
        sets = {entry["NAME"]: entry for entry in [*train, *test]}
        argv = [
            *("--config-file", CONFIG, *TINY, "OUTPUT_DIR", str(tmp_path / "output")),
            *("DATASETS.COCO_SETS", str(list(sets.values()))),
            *("DATASETS.TRAIN", str(tuple(names[0])), "DATASETS.TEST", str(tuple(names[1]))),
            *("MODEL.ROI_HEADS.NUM_CLASSES", "2", "INPUT.MASK_FORMAT", "polygon"),
            *("SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()", "SOLVER.CHECKPOINT_PERIOD", "100"),
            *("TEST.EVAL_PERIOD", "0", "SOLVER.WARMUP_ITERS", "0", *options),
        ]
        monkeypatch.setattr(sys, "argv", ["train_net.py", *argv])
        capsys.readouterr()
        code = train_net.cli()
        lines = [line for line in capsys.readouterr().err.splitlines() if line]
        if code == 2:
            assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return code, [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]

    return call
