"""Wrong input: one line that names the culprit and the mend, exit code 2, nothing written."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from wsbcn_d2 import data
from wsbcn_d2.data.checks import Wanted
from wsbcn_d2.engine import UsageError, check_config, load_config, processes
from wsbcn_d2.engine.checks import check_datasets, from_yaml

CONFIG = ROOT / "configs" / "shapes" / "mask_rcnn_R_18_FPN_bcn_ws.yaml"
GN_CONFIG = ROOT / "configs" / "shapes" / "mask_rcnn_R_18_FPN_gn.yaml"


@pytest.fixture
def run(train_net, tiny_options, tmp_path, monkeypatch, capsys):
    """Runs the command line on wrong input; gives the message after ``error: ``."""
    output = tmp_path / "output"
    output.mkdir()
    (output / "model_final.pth").write_bytes(b"an earlier result")
    (output / "metrics.json").write_text("{}")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def snapshot():
        return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in output.rglob("*")}

    def refused(*_, **__):
        raise AssertionError("the job was started")

    monkeypatch.setattr(processes, "launch", refused)

    def call(*options, config=CONFIG, flags=()):
        before = snapshot()
        argv = [str(part) for part in ("--config-file", config, *flags, *tiny_options, *options)]
        monkeypatch.setattr(sys, "argv", ["train_net.py", *argv])
        assert train_net.cli() == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line]
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        assert snapshot() == before
        return lines[0].removeprefix("error: ")

    return call


def has(message, *parts):
    missing = [part for part in parts if part not in message]
    assert not missing, (missing, message)


# The config file.


def test_missing_config(run):
    has(run(config="configs/no_such.yaml"), "'configs/no_such.yaml' not found", "--config-file")


def test_no_config(run):
    has(run(config=""), "no config given", "--config-file FILE")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("MODEL: {BCM: {UPDATE_RATE: 0.1}}", ["MODEL.BCM"]),
        ("MODEL: {BCN: {UPDATE_RATE: fast}}", ["MODEL.BCN.UPDATE_RATE", "float", "str"]),
        ("MODEL: [unclosed", ["line 1"]),
        ("_BASE_: no_such_base.yaml", ["no_such_base.yaml"]),
    ],
    ids=["unknown key", "wrong type", "broken YAML", "missing base"],
)
def test_wrong_config(run, tmp_path, text, parts):
    path = tmp_path / "own.yaml"
    path.write_text(text + "\n")
    has(run(config=path), f"config file '{path}'", *parts)


# Overrides.


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("MODEL.BCM.UPDATE_RATE", "0.1"), ["MODEL.BCM.UPDATE_RATE"]),
        (("SOLVER.BASE_LRR", "0.1"), ["SOLVER.BASE_LRR"]),
        (("SOLVER.BASE_LR", "fast"), ["BASE_LR", "float", "str"]),
        (("MODEL.WS.EPS", "[1]"), ["EPS", "float"]),
        (("SOLVER.BASE_LR",), ["odd length", "SOLVER.BASE_LR"]),
    ],
    ids=["unknown node", "unknown key", "wrong type", "list for a number", "no value"],
)
def test_wrong_overrides(run, options, parts):
    has(run(*options), "command-line override", "KEY VALUE", *parts)


# Data sets and weights.


@pytest.mark.parametrize("key", ["DATASETS.TRAIN", "DATASETS.TEST"])
def test_unknown_dataset(run, key):
    message = run(key, "('coco_2017_trian',)")
    has(message, key, "'coco_2017_trian' is not registered", "did you mean coco_2017_train")
    has(run(key, "('qqqqqqqq',)"), "'qqqqqqqq' is not registered: register it first")


@pytest.mark.parametrize("key", ["DATASETS.TRAIN", "DATASETS.TEST"])
def test_absent_dataset(run, tmp_path, key):
    name, path = "test_absent_dataset", str(tmp_path / "nowhere" / "instances.json")
    DatasetCatalog.register(name, lambda: [])
    MetadataCatalog.get(name).set(json_file=path, image_root=str(tmp_path))
    try:
        has(run(key, f"('{name}',)"), key, name, f"{path} not found", "DETECTRON2_DATASETS")
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_absent_images(run, tmp_path):
    name, path = "test_absent_images", str(tmp_path / "images")
    (tmp_path / "instances.json").write_text("{}")
    DatasetCatalog.register(name, lambda: [])
    metadata = MetadataCatalog.get(name)
    metadata.set(json_file=str(tmp_path / "instances.json"), image_root=path)
    try:
        has(run("DATASETS.TRAIN", f"('{name}',)"), name, f"{path} not found")
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_evaluation_does_not_ask_for_training_data(tiny_options):
    options = [*tiny_options, "DATASETS.TRAIN", "('no_such',)", "SOLVER.IMS_PER_BATCH", "3"]
    cfg = load_config(str(CONFIG), options)
    check_config(cfg, world_size=2, eval_only=True)
    with pytest.raises(UsageError, match="no_such"):
        check_config(cfg, world_size=2)


@pytest.mark.parametrize("flags", [(), ("--eval-only",)])
def test_missing_weights(run, flags):
    message = run("MODEL.WEIGHTS", "no_such/model_final.pth", flags=flags)
    has(message, "MODEL.WEIGHTS", "no_such/model_final.pth", "not found")


# The model.


@pytest.mark.parametrize("part", ["RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"])
def test_unknown_norm(run, part):
    message = run(f"MODEL.{part}.NORM", "BNC")
    has(message, "unknown norm 'BNC'", f"MODEL.{part}.NORM='BNC'", "GN", "BCN", "SyncBCN")


def test_the_hint_names_the_culprit_alone(run):
    message = run("MODEL.SEM_SEG_HEAD.NORM", "BNC", "MODEL.META_ARCHITECTURE", "PanopticFPN")
    assert message.endswith("(with MODEL.SEM_SEG_HEAD.NORM='BNC')"), message
    message = run("MODEL.FPN.OUT_CHANNELS", "48")
    assert message.endswith("(with MODEL.FPN.NORM='BCN', MODEL.FPN.OUT_CHANNELS=48)"), message
    message = run("MODEL.FPN.NORM", "BNC", "MODEL.ROI_BOX_HEAD.NORM", "BNC")
    assert message.endswith("(with MODEL.FPN.NORM='BNC', MODEL.ROI_BOX_HEAD.NORM='BNC')"), message
    assert "NORM" not in run("MODEL.ROI_MASK_HEAD.NAME", "NoSuchHead")


def test_parts_that_are_not_there(run):
    has(run("MODEL.WS.PARTS", "['head']"), "MODEL.WS.PARTS", "'head' fits no module", "backbone")
    has(run("MODEL.WS.PARTS", "['proposal_generator']"), "MODEL.WS.PARTS", "nothing to standardize")


def test_no_data_sets(run):
    has(run("DATASETS.TRAIN", "()"), "DATASETS.TRAIN is empty: name a data set")
    has(run("DATASETS.TEST", "()", flags=["--eval-only"]), "DATASETS.TEST is empty")


@pytest.mark.parametrize("key", ["MODEL.FPN.OUT_CHANNELS", "MODEL.ROI_BOX_HEAD.CONV_DIM"])
def test_channels_that_the_groups_of_bcn_do_not_divide(run, key):
    message = run(key, "48")
    has(message, "48 channels into 32 groups", "multiple")


@pytest.mark.parametrize("key", ["MODEL.FPN.OUT_CHANNELS", "MODEL.ROI_MASK_HEAD.CONV_DIM"])
def test_channels_that_the_groups_of_gn_do_not_divide(run, key):
    message = run(key, "48", config=GN_CONFIG)
    has(message, "num_channels", "divisible", "NORM='GN'")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("MODEL.WS.FORMULA", "timm"), ["'timm'", "biased, unbiased, unbiased_std"]),
        (("MODEL.BACKBONE.NAME", "build_no_such"), ["build_no_such"]),
        (("MODEL.ROI_MASK_HEAD.NAME", "NoSuchHead"), ["NoSuchHead"]),
        (
            (
                *("MODEL.RESNETS.DEPTH", "50"),
                *("MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False, False, False, True]"),
            ),
            ["deformable", "DEFORM_ON_PER_STAGE"],
        ),
    ],
    ids=["formula", "backbone", "head", "deformable"],
)
def test_models_that_cannot_be_built(run, options, parts):
    has(run(*options), *parts)


# Batch and update rate.


@pytest.mark.parametrize(("images", "processes"), [(3, 2), (1, 2), (0, 1), (-2, 1)])
def test_a_batch_that_the_processes_cannot_share(run, images, processes):
    message = run("SOLVER.IMS_PER_BATCH", images, flags=("--num-gpus", processes))
    has(message, f"SOLVER.IMS_PER_BATCH {images}", f"positive multiple of {processes}")


def test_a_batch_that_the_machines_cannot_share(run):
    flags = ("--num-gpus", "2", "--num-machines", "2")
    has(run("SOLVER.IMS_PER_BATCH", "6", flags=flags), "multiple of 4")


def test_a_batch_that_the_reference_processes_cannot_share(run):
    options = ("SOLVER.IMS_PER_BATCH", "6", "SOLVER.REFERENCE_WORLD_SIZE", "4")
    has(run(*options), "SOLVER.IMS_PER_BATCH 6", "SOLVER.REFERENCE_WORLD_SIZE 4", "multiple")


def test_a_batch_that_is_rescaled_by_the_reference_processes(tiny_options):
    options = ["SOLVER.IMS_PER_BATCH", "8", "SOLVER.REFERENCE_WORLD_SIZE", "8"]
    check_config(load_config(str(CONFIG), [*tiny_options, *options]), world_size=3)


@pytest.mark.parametrize("schedule", ["cosine", ""])
def test_wrong_schedule_of_the_update_rate(run, schedule):
    message = run("MODEL.BCN.UPDATE_RATE_SCHEDULE", schedule)
    has(message, "MODEL.BCN.UPDATE_RATE_SCHEDULE", repr(schedule), "constant, lr")


@pytest.mark.parametrize("rate", ["1.5", "-0.1"])
def test_wrong_update_rate(run, rate):
    has(run("MODEL.BCN.UPDATE_RATE", rate), "MODEL.BCN", rate, "[0, 1]")


def test_wrong_period_of_the_monitor(run):
    has(run("MODEL.BCN.MONITOR_PERIOD", "-5"), "MODEL.BCN", "period", "-5")


# What is no error.


def test_the_shipped_configs_pass(tiny_options):
    cfg = load_config(str(CONFIG), tiny_options)
    assert isinstance(cfg, CfgNode) and cfg.is_frozen()
    check_config(cfg)
    assert cfg.MODEL.DEVICE == "cpu"  # the check builds on the meta device, in a copy


def test_data_that_is_rendered_on_first_use_need_not_be_there(tiny_options, tmp_path):
    name = "test_rendered_later"
    data.register_shapes_split(name, tmp_path / "later", "train", num_images=1)
    try:
        options = [*tiny_options, "DATASETS.TRAIN", f"('{name}',)"]
        check_config(load_config(str(CONFIG), options))
        assert not (tmp_path / "later").exists()
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize("weights", ["", "detectron2://ImageNetPretrained/MSRA/R-50.pkl"])
def test_weights_that_are_resolved_on_loading(tiny_options, weights):
    check_config(load_config(str(CONFIG), [*tiny_options, "MODEL.WEIGHTS", weights]))


@pytest.mark.parametrize("available", [False, True])
def test_the_cpu_stands_in_for_a_missing_gpu(monkeypatch, available):
    monkeypatch.setattr("torch.cuda.is_available", lambda: available)
    for device in ("cuda", "cuda:1"):
        cfg = load_config(str(CONFIG), ["MODEL.DEVICE", device])
        expected = device if available else "cpu"
        assert expected == cfg.MODEL.DEVICE


@pytest.mark.slow
def test_as_a_command(tmp_path):
    output = tmp_path / "output"
    command = ["--config-file", CONFIG, "MODEL.FPN.NORM", "BNC", "OUTPUT_DIR", output]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "tools" / "train_net.py", *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "unknown norm 'BNC'" in errors[0]
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "architecture, key, classes",
    [
        ("GeneralizedRCNN", "MODEL.ROI_HEADS.NUM_CLASSES", 11),
        ("PanopticFPN", "MODEL.ROI_HEADS.NUM_CLASSES", 11),
        ("RetinaNet", "MODEL.RETINANET.NUM_CLASSES", 22),
        ("WSRetinaNet", "MODEL.RETINANET.NUM_CLASSES", 22),
        ("ProposalNetwork", "", None),
    ],
)
def test_what_a_config_says_of_its_data(architecture, key, classes, tiny_options):
    options = ["MODEL.META_ARCHITECTURE", architecture, "INPUT.RANDOM_FLIP", "none"]
    options += ["MODEL.ROI_HEADS.NUM_CLASSES", "11", "MODEL.RETINANET.NUM_CLASSES", "22"]
    options += ["MODEL.MASK_ON", "False", "INPUT.MASK_FORMAT", "bitmask"]
    options += ["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "7", "INPUT.PICTURE_RANGE", "[1, 9]"]
    cfg = load_config(str(CONFIG), [*tiny_options, *options])
    expected = Wanted(classes=classes, picture_range=[1, 9], classes_key=key)
    assert from_yaml._YamlSetup(cfg).wanted(True) == expected
    more = ["MODEL.KEYPOINT_ON", "True", "INPUT.RANDOM_FLIP", "vertical", "MODEL.MASK_ON", "True"]
    more += ["TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.2]", "INPUT.MASK_FORMAT", "polygon"]
    cfg = load_config(str(CONFIG), [*tiny_options, *options, *more])
    found = from_yaml._YamlSetup(cfg).wanted(True)
    assert (found.keypoints, found.sigmas, found.flip) == (7, 2, True)
    assert (found.masks, found.mask_format) == (True, "polygon")


def test_what_is_wanted_of_data_unless_said_otherwise():
    assert vars(Wanted()) == {
        **{"classes": None, "masks": False, "mask_format": "bitmask", "keypoints": 0, "sigmas": 0},
        **{"flip": False, "picture_range": (), "classes_key": "MODEL.ROI_HEADS.NUM_CLASSES"},
        **{"masks_key": "MODEL.MASK_ON", "format_key": "INPUT.MASK_FORMAT"},
    }


@pytest.mark.parametrize(
    "image_format, means, refused",
    [
        *(("YUV-BT.601", 3, False), ("YUV-BT.601", 1, True), ("RGB", 3, False), ("RGB", 1, True)),
        *(("BGR", 4, True), ("L", 1, False), ("other", 4, False)),
    ],
)
def test_so_many_pixel_statistics_as_channels(image_format, means, refused, tiny_options):
    options = ["INPUT.FORMAT", image_format, "MODEL.PIXEL_MEAN", str([1.0] * means)]
    cfg = load_config(str(CONFIG), [*tiny_options, *options, "MODEL.PIXEL_STD", str([1.0] * means)])
    if refused:
        channels = 1 if image_format == "L" else 3
        message = f"INPUT.FORMAT {image_format} needs {channels} numbers each"
        with pytest.raises(UsageError, match=message):
            from_yaml._YamlSetup(cfg).wanted(True)
    else:
        from_yaml._YamlSetup(cfg).wanted(True)
    cfg = load_config(str(CONFIG), [*tiny_options, *options, "MODEL.PIXEL_STD", "[1.0, 1.0]"])
    with pytest.raises(UsageError, match=f"not {means} and 2"):
        from_yaml._YamlSetup(cfg).wanted(False)


def test_how_to_get_a_set_is_said(tmp_path, monkeypatch):
    name = "test_how_to_get"
    DatasetCatalog.register(name, lambda: [])
    metadata = MetadataCatalog.get(name).set(json_file=str(tmp_path / "a.json"))
    try:
        with pytest.raises(UsageError) as error:
            check_datasets([name], "KEY")
        start = f"KEY: dataset '{name}' is absent: {tmp_path}/a.json not found; "
        end = " and set DETECTRON2_DATASETS to the folder that holds it"
        assert str(error.value) == f"{start}get the dataset{end}"
        metadata.how_to_get = "ask somebody"
        with pytest.raises(UsageError) as error:
            check_datasets([name], "KEY")
        assert str(error.value) == f"{start}ask somebody{end}"
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
