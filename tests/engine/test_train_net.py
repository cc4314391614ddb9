"""``tools/train_net.py`` end to end, on a few small images: train, evaluate, resume."""

import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from detectron2.engine import DefaultTrainer, default_argument_parser, hooks
from detectron2.utils.logger import setup_logger
from torch.testing import assert_close

from wsbcn_d2 import EstimatedBatchNorm2d
from wsbcn_d2.checkpoint import CheckpointError
from wsbcn_d2.engine import EstimateSync, Trainer, UpdateRateSchedule, load_config, trainer
from wsbcn_d2.engine.trainer import train_net as one_process

CONFIG = str(ROOT / "configs" / "shapes" / "mask_rcnn_R_18_FPN_bcn_ws.yaml")
STEPS = 3


@pytest.fixture(autouse=True)
def own_logging():
    """Detectron2 sets its loggers up once per folder; take down what a test has set up."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "wsbcn_d2")]
    before = [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        for handler in set(logger.handlers) - set(handlers):
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(level)
        logger.propagate = propagate
    setup_logger.cache_clear()


@pytest.fixture
def command(train_net, tiny_options, monkeypatch):
    """Runs the command line in this process; gives its exit code."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def call(*options, flags=()):
        argv = ["--config-file", CONFIG, *flags, *tiny_options, *map(str, options)]
        monkeypatch.setattr(sys, "argv", ["train_net.py", *argv])
        return train_net.cli()

    return call


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def test_train_then_evaluate_the_same(command, tiny_options, tmp_path, capsys):
    output = tmp_path / "output"
    rate = ("MODEL.BCN.UPDATE_RATE", "0.5", "MODEL.BCN.UPDATE_RATE_SCHEDULE", "lr")
    assert command(*rate, "SOLVER.BASE_LR", "0.01") == 0
    said = capsys.readouterr().out
    assert "Running on the CPU" in said

    # What Detectron2's users look for.
    files = {path.name for path in output.iterdir()}
    assert {"config.yaml", "log.txt", "last_checkpoint", "metrics.json", "model_final.pth"} <= files
    assert any(name.startswith("events.out.tfevents") for name in files)
    trained, evaluated = lines_of(output)  # the results come after the last step
    for name in ("total_loss", "loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "lr"):
        assert math.isfinite(trained[name]), name
    assert trained["iteration"] == STEPS - 1
    assert trained["lr"] < 0.01  # still warming up, and the update rate with it
    assert trained["bcn_update_rate"] == pytest.approx(0.5 * trained["lr"] / 0.01)
    assert {"bbox/AP", "segm/AP", "bbox/AP50", "segm/APs"} <= set(evaluated)

    saved = torch.load(output / "model_final.pth", map_location="cpu", weights_only=False)
    assert saved["iteration"] == STEPS - 1
    counts = {k: v for k, v in saved["model"].items() if k.endswith("num_batches_tracked")}
    assert {int(v) for k, v in counts.items() if "backbone" in k} == {STEPS}

    # --eval-only on the checkpoint: the same predictions, so the same AP, to the last bit.
    predictions = json.loads((output / "inference" / "coco_instances_results.json").read_text())
    assert predictions
    again = tmp_path / "again"
    argv = ["--config-file", CONFIG, "--eval-only", *tiny_options]
    argv += ["OUTPUT_DIR", str(again), "MODEL.WEIGHTS", str(output / "model_final.pth")]
    results = one_process(default_argument_parser().parse_args(argv))
    results_file = again / "inference" / "coco_instances_results.json"
    assert json.loads(results_file.read_text()) == predictions
    for task in ("bbox", "segm"):
        for name, value in results[task].items():
            assert value == evaluated[f"{task}/{name}"] or math.isnan(value), name
    assert not (again / "metrics.json").exists()


def test_evaluation_from_the_command_line_with_augmentation(command, tmp_path, capsys):
    options = ("TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(64,)", "TEST.AUG.FLIP", "False")
    assert command(*options, flags=("--eval-only",)) == 0
    assert (tmp_path / "output" / "inference_TTA" / "coco_instances_results.json").exists()
    # Results that are expected and do not come are an error, as in Detectron2.
    with pytest.raises(SystemExit) as exit_code:
        command("TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 77.0, 0.1]]", flags=("--eval-only",))
    assert exit_code.value.code == 1


@pytest.mark.parametrize("resume", [True, False])
def test_what_is_evaluated_with_and_without_resume(resume, tiny_options, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        trainer.WSBCNCheckpointer,
        "resume_or_load",
        lambda self, path, *, resume: asked.append((self.save_dir, path, resume)),
    )
    monkeypatch.setattr(Trainer, "test", classmethod(lambda cls, cfg, model: {"tested": model}))
    argv = ["--config-file", CONFIG, "--eval-only", *["--resume"] * resume, *tiny_options]
    argv += ["MODEL.WEIGHTS", "some.pth"]
    results = one_process(default_argument_parser().parse_args(argv))
    assert asked == [(str(tmp_path / "output"), "some.pth", resume)]
    assert results.keys() == {"tested"}


def test_resume_restores_everything(command, tiny_options, tmp_path):
    assert command("SOLVER.MAX_ITER", 2, "DATASETS.TEST", "()") == 0
    output = tmp_path / "output"
    options = [*tiny_options, "SOLVER.MAX_ITER", "4", "DATASETS.TEST", "()"]
    trainer = Trainer(load_config(CONFIG, options))
    trainer.resume_or_load(resume=True)
    saved = torch.load(output / "model_final.pth", map_location="cpu", weights_only=False)
    assert trainer.start_iter == saved["iteration"] + 1 == 2
    assert_close(dict(trainer.model.state_dict()), dict(saved["model"]), rtol=0, atol=0)
    momenta = [state["momentum_buffer"] for state in trainer.optimizer.state.values()]
    stored = saved.get("optimizer", saved.get("trainer", {}).get("_trainer", {}).get("optimizer"))
    expected = [state["momentum_buffer"] for state in stored["state"].values()]
    assert len(momenta) == len(expected) > 0
    assert_close(momenta, expected, rtol=0, atol=0)
    before = lines_of(output)
    trainer.train()
    lines = lines_of(output)
    assert lines[: len(before)] == before
    assert [line["iteration"] for line in lines] == [1, 3]
    norm = trainer.model.backbone.bottom_up.stem.conv1.norm.bn
    assert norm.num_batches_tracked == 4


@pytest.mark.parametrize("sync", [True, False])
def test_hooks_of_the_trainer(tiny_options, tmp_path, sync):
    options = ["MODEL.BCN.SYNC_ESTIMATES", str(sync), "TEST.PRECISE_BN.ENABLED", "True"]
    trainer = Trainer(load_config(CONFIG, [*tiny_options, *options]))
    kinds = [type(hook) for hook in trainer._hooks]
    assert kinds.count(UpdateRateSchedule) == 1 and kinds.count(EstimateSync) == int(sync)
    # Rates and synchronized estimates come before whatever reads or saves the model.
    for later in (hooks.PreciseBN, hooks.PeriodicCheckpointer, hooks.EvalHook):
        assert kinds.index(hooks.LRScheduler) < kinds.index(UpdateRateSchedule)
        assert kinds.index(UpdateRateSchedule) < kinds.index(later)
        assert not sync or kinds.index(EstimateSync) < kinds.index(later)


# A stock backbone and stock heads: their builders know nothing of BCN's keys, the trainer does.
STOCK_PARTS = [
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
    *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"),
    *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
]


def test_the_update_rate_of_the_config_is_that_of_training(tiny_options):
    options = ["MODEL.BCN.UPDATE_RATE", "0.25", "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()"]
    trainer = Trainer(load_config(CONFIG, [*tiny_options, *options, *STOCK_PARTS]))
    trainer.train()
    norms = [m for m in trainer.model.modules() if isinstance(m, EstimatedBatchNorm2d)]
    assert norms and {norm.momentum for norm in norms} == {0.25}


@pytest.mark.parametrize("init", [True, False])
def test_first_batch_initialisation_is_the_configs(tiny_options, init):
    options = ["MODEL.BCN.FIRST_BATCH_INIT", str(init), *STOCK_PARTS]
    trainer = Trainer(load_config(CONFIG, [*tiny_options, *options]))
    norms = [m for m in trainer.model.modules() if isinstance(m, EstimatedBatchNorm2d)]
    assert norms and {int(norm.num_batches_tracked) for norm in norms} == {0 if init else 1}


DRIVER = """
import runpy, sys
from wsbcn_d2 import data
for split in ("train", "val"):
    data.register_shapes_split("killed_" + split, sys.argv[1], split, 4, image_size=(64, 80))
del sys.argv[1]
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_resume_after_kill_9(tiny_options, tmp_path):
    output = tmp_path / "output"
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(script=str(ROOT / "tools" / "train_net.py")))

    def start(steps, *flags):
        argv = [driver, tmp_path / "data", "--config-file", CONFIG, *flags, *tiny_options]
        argv += ["DATASETS.TRAIN", "('killed_train',)", "DATASETS.TEST", "('killed_val',)"]
        argv += ["SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.MAX_ITER", steps]
        with (tmp_path / "log").open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-W", "ignore", *map(str, argv)],
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )

    process = start(100_000)
    try:
        deadline = time.monotonic() + 300
        while not (output / "last_checkpoint").exists():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
    finally:
        process.kill()  # SIGKILL
        process.wait()
    assert process.returncode == -signal.SIGKILL
    name = (output / "last_checkpoint").read_text()
    done = torch.load(output / name, map_location="cpu", weights_only=False)["iteration"] + 1
    assert done % 2 == 0

    process = start(done + 2, "--resume")
    assert process.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    final = torch.load(output / "model_final.pth", map_location="cpu", weights_only=False)
    assert final["iteration"] == done + 1
    # Every step up to the checkpoint counts, and each of the two after it, once.
    counts = [v for k, v in final["model"].items() if k.endswith("num_batches_tracked")]
    assert max(int(count) for count in counts) == done + 2
    assert f"Starting training from iteration {done}" in (output / "log.txt").read_text()
    trained, evaluated = lines_of(output)[-2:]
    assert trained["iteration"] == done + 1 and "bbox/AP" in evaluated


def test_a_checkpoint_without_the_optimizers_state_is_told(caplog):
    """As a stock trainer of Detectron2 v0.6 leaves it."""
    trainer = Trainer.__new__(Trainer)
    trainer._hooks, trainer._trainer = [], None
    with caplog.at_level(logging.WARNING, logger="wsbcn_d2"):
        trainer.load_state_dict({"iteration": 5})
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("wsbcn_d2")]
    assert "no optimizer state" in message and "momentum starts at zero" in message
    assert trainer.iter == 5


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_the_checkpoints_error_is_not_hidden_by_that_of_a_log(kind, monkeypatch):
    """Both fail on a full disk; the first says what to do."""
    disk, told = OSError(28, "No space left on device"), CheckpointError("make space")

    def train(self):
        try:
            raise told from disk
        except CheckpointError as error:
            later = kind("a log cannot be closed")
            later.__context__ = error
            raise later  # noqa: B904

    monkeypatch.setattr(DefaultTrainer, "train", train)
    with pytest.raises(CheckpointError if kind is OSError else kind) as caught:
        Trainer.train(Trainer.__new__(Trainer))
    if kind is OSError:
        assert caught.value is told and told.__cause__ is disk
    monkeypatch.setattr(DefaultTrainer, "train", lambda self: "results")
    assert Trainer.train(Trainer.__new__(Trainer)) == "results"


def test_loaders_read_as_the_config_says(tiny_cfg, monkeypatch):
    asked = []

    def build_mapper(cfg, names, *, is_train):
        asked.append((list(names), is_train))
        return "mapper"

    monkeypatch.setattr(trainer, "build_mapper", build_mapper)
    for name in ("build_detection_train_loader", "build_detection_test_loader"):
        monkeypatch.setattr(trainer, name, lambda *args, mapper, n=name: (n, args[1:], mapper))
    cfg = tiny_cfg("DATASETS.TRAIN", ("one", "two"))
    monkeypatch.setattr(trainer, "classification_test_loader", lambda cfg, name: None)
    assert Trainer.build_train_loader(cfg) == ("build_detection_train_loader", (), "mapper")
    found = Trainer.build_test_loader(cfg, "three")
    assert found == ("build_detection_test_loader", ("three",), "mapper")
    assert asked == [(["one", "two"], True), (["three"], False)]
    monkeypatch.setattr(trainer, "classification_test_loader", lambda cfg, name: [name])
    assert Trainer.build_test_loader(cfg, "four") == ["four"]


def test_augmented_evaluation_comes_once_after_training(tiny_cfg, monkeypatch):
    done = []

    class Fake:
        model = "model"

        def __init__(self, cfg):
            done.append("built")

        def resume_or_load(self, *, resume):
            done.append(("resume", resume))

        def register_hooks(self, added):
            (self.hook,) = added
            done.append((type(self.hook), self.hook._period))

        def test_with_TTA(self, cfg, model):
            return {"tested": model}

        def train(self):
            return self.hook._func()

    monkeypatch.setattr(trainer, "Trainer", Fake)
    monkeypatch.setattr(trainer, "set_up_process", lambda *args: done.append(args[2:]))
    cfg = tiny_cfg("TEST.AUG.ENABLED", True, "OUTPUT_DIR", "out")
    monkeypatch.setattr(trainer, "load_config", lambda *args: done.append(args) or cfg)
    args = Namespace(config_file="a.yaml", opts=["A", "b"], eval_only=False, resume=True)
    assert one_process(args) == {"tested": "model"}
    assert done == [
        *(("a.yaml", ["A", "b"]), ("out", "cpu"), "built", ("resume", True)),
        (hooks.EvalHook, 0),
    ]
