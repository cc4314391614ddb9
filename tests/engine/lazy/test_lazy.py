"""Training of Python configs: lengths, precision, hooks."""

import copy
from types import SimpleNamespace

import pytest
import torch
from detectron2.config import LazyCall
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import hooks
from detectron2.solver import WarmupParamScheduler, get_default_optimizer_params
from detectron2.utils import comm
from fvcore.common.param_scheduler import MultiStepParamScheduler
from omegaconf import OmegaConf
from torch import nn

from wsbcn_d2.data.checks import Wanted
from wsbcn_d2.engine import ChannelMonitor, EstimateSync, UpdateRateSchedule, UsageError, lazy
from wsbcn_d2.engine.hooks import ResumedSchedule
from wsbcn_d2.engine.lazy import checking, training
from wsbcn_d2.engine.lazy.reading import load_lazy_config, resumed_schedule_of


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)


def data(total_batch_size):
    return []


def config(folder, **train):
    """What training asks of a config, and no more."""
    steps = LazyCall(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[60, 80], num_updates=90
    )
    return OmegaConf.create(
        {
            "model": LazyCall(Model)(),
            "dataloader": {"train": LazyCall(data)(total_batch_size=16)},
            "optimizer": LazyCall(torch.optim.SGD)(
                params=LazyCall(get_default_optimizer_params)(), lr=0.5
            ),
            "lr_multiplier": LazyCall(WarmupParamScheduler)(
                scheduler=steps, warmup_factor=0.25, warmup_length=0.1
            ),
            "train": {
                **{"device": "cpu", "output_dir": str(folder), "init_checkpoint": ""},
                **{"max_iter": 90, "eval_period": 30, "log_period": 20, "ddp": {}},
                **{"amp": {"enabled": False}, "checkpointer": {"period": 45, "max_to_keep": 3}},
                **train,
            },
        }
    )


def lengths(cfg):
    return (
        *(cfg.dataloader.train.total_batch_size, cfg.optimizer.lr),
        *(list(cfg.lr_multiplier.scheduler.milestones), cfg.train.max_iter),
        *(cfg.train.eval_period, cfg.train.checkpointer.period, cfg.train.reference_world_size),
    )


@pytest.mark.parametrize(
    "reference, processes, expected",
    [
        (8, 8, (16, 0.5, [60, 80], 90, 30, 45, 8)),
        (0, 3, (16, 0.5, [60, 80], 90, 30, 45, 0)),
        (8, 4, (8, 0.25, [120, 160], 180, 60, 90, 4)),
        (8, 16, (32, 1.0, [30, 40], 45, 15, 22, 16)),
        (1, 100, (1600, 50.0, [1, 1], 1, 0, 1, 100)),
    ],
)
def test_lengths_of_another_number_of_processes(reference, processes, expected, tmp_path):
    cfg = config(tmp_path, reference_world_size=reference)
    before = copy.deepcopy(cfg)
    assert lengths(lazy.auto_scale(cfg, processes)) == expected
    assert cfg == before  # it is another one that is changed


@pytest.mark.parametrize("end, refused", [(79, True), (80, True), (81, False)])
def test_a_milestone_lies_before_the_end(end, refused, tmp_path):
    cfg = config(tmp_path, max_iter=end)
    if not refused:
        checking._check_milestones(cfg)
        return
    with pytest.raises(UsageError, match=f"train.max_iter {end} ends before .*milestones.*60, 80"):
        checking._check_milestones(cfg)


class Reached(Exception):
    pass


@pytest.mark.parametrize("amp", [True, False])
def test_the_precision_is_the_configs(amp, tmp_path, monkeypatch):
    def reached(*_):
        raise Reached

    chosen = "AMPTrainer" if amp else "SimpleTrainer"
    monkeypatch.setattr(training, chosen, reached)
    with pytest.raises(Reached):
        lazy.train(config(tmp_path, amp={"enabled": amp}))


@pytest.mark.parametrize("main", [True, False])
@pytest.mark.parametrize("precise", [True, False])
def test_hooks_and_their_order(main, precise, tmp_path, monkeypatch):
    """Of a process, the first or another; synchronized estimates come before what reads them."""
    monkeypatch.setattr(comm, "is_main_process", lambda: main)
    cfg = config(tmp_path, precise_bn={"enabled": precise, "num_iter": 7})
    cfg.train.bcn = {"update_rate": 0.25, "monitor_period": 9}
    model = nn.Sequential(nn.BatchNorm2d(1))
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    saves = SimpleNamespace(path_manager=None)
    found = training._hooks(cfg, SimpleNamespace(model=model, optimizer=optimizer), saves)
    assert [type(hook) for hook in found] == [
        *(ResumedSchedule, hooks.IterationTimer, hooks.LRScheduler),
        *(UpdateRateSchedule, EstimateSync, ChannelMonitor),
        *[hooks.PreciseBN] * precise,
        *[hooks.PeriodicCheckpointer] * main,
        hooks.EvalHook,
        *[hooks.PeriodicWriter] * main,
    ]
    by_kind = {type(hook): hook for hook in found}
    assert by_kind[hooks.EvalHook]._period == 30
    if main:
        assert by_kind[hooks.PeriodicWriter]._period == 20
        saving = by_kind[hooks.PeriodicCheckpointer]
        assert (saving.checkpointer, saving.period, saving.max_to_keep) == (saves, 45, 3)
    if precise:
        assert (by_kind[hooks.PreciseBN]._num_iter, by_kind[hooks.PreciseBN]._model) == (7, model)


def test_what_a_resumed_run_compares(tmp_path):
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.5)
    hook = resumed_schedule_of(config(tmp_path, on_resume="config"), optimizer)
    assert hook.state_dict() == {
        "schedule": {
            "optimizer.lr": 0.5,
            "lr_multiplier.scheduler.values": [1.0, 0.1, 0.01],
            "lr_multiplier.scheduler.milestones": [60, 80],
            "lr_multiplier.scheduler.num_updates": 90,
            "lr_multiplier.warmup_factor": 0.25,
            "lr_multiplier.warmup_length": 0.1,
            "train.max_iter": 90,
            "dataloader.train.total_batch_size": 16,
        }
    }
    assert next(iter(hook.state_dict()["schedule"])) == "optimizer.lr"  # an older one's alone
    with pytest.raises(ValueError, match="train.on_resume 'mine'"):
        resumed_schedule_of(config(tmp_path, on_resume="mine"), optimizer)


PARTS = """
dataloader = {"train": {"total_batch_size": 2}}
lr_multiplier = model = optimizer = {}
train = {"device": "cuda", "max_iter": 9}
"""


@pytest.fixture
def config_file(tmp_path):
    (tmp_path / "own.py").write_text(PARTS)
    return str(tmp_path / "own.py")


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1"])
def test_the_cpu_stands_in_for_a_missing_gpu(config_file, monkeypatch, device, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    cfg = load_lazy_config(config_file, [f"train.device={device}"])
    assert cfg.train.device == (device if there else "cpu")


def test_sets_of_ones_own_are_registered(config_file, tmp_path):
    entry = {"NAME": "lazy_set", "JSON": str(tmp_path / "a.json"), "IMAGES": str(tmp_path)}
    assert "lazy_set" not in DatasetCatalog.list()
    load_lazy_config(config_file, [f"+dataloader.coco_sets=[{entry}]".replace("'", "")])
    try:
        assert MetadataCatalog.get("lazy_set").json_file == entry["JSON"]
    finally:
        DatasetCatalog.remove("lazy_set")
        MetadataCatalog.remove("lazy_set")


@pytest.mark.parametrize("suffix", ["yaml", "yml"])
def test_a_saved_config_runs_nothing(tmp_path, suffix):
    path, marker = tmp_path / f"own.{suffix}", tmp_path / "ran"
    path.write_text(f"train: !!python/object/apply:os.mkdir ['{marker}']\n")
    with pytest.raises(UsageError, match=f"own.{suffix}"):
        load_lazy_config(str(path))
    assert not marker.exists()


@pytest.mark.parametrize("part", ["dataloader", "lr_multiplier", "model", "optimizer", "train"])
def test_every_part_is_needed(tmp_path, part):
    (tmp_path / "own.py").write_text(f"{PARTS}\ndel {part}\n")
    with pytest.raises(UsageError, match=f"defines no {part}: see configs/lazy"):
        load_lazy_config(str(tmp_path / "own.py"))


@pytest.mark.parametrize(
    "text, error",
    [
        ("train.max_itre=3", "did you mean max_iter"),
        ("train.zebra=3", r"no 'train.zebra': \+train.zebra=... adds it"),
        ("--train.max_iter=3", "options go before"),
        ("train.max_iter", "say KEY=VALUE"),
    ],
)
def test_overrides_of_unknown_keys(config_file, text, error):
    with pytest.raises(UsageError, match=f"command-line override: .*{error}"):
        load_lazy_config(config_file, [text])
    assert load_lazy_config(config_file, ["+train.zebra=3", "train.max_iter=4"]).train == {
        **{"device": "cpu", "max_iter": 4, "zebra": 3},
    }


def test_options_of_groups_of_parameters_are_not_compared(tmp_path):
    cfg = config(tmp_path)
    cfg.optimizer.params.weight_decay_norm = 0.5
    cfg.optimizer.weight_decay = 0.25
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.5)
    schedule = resumed_schedule_of(cfg, optimizer).state_dict()["schedule"]
    assert {k: v for k, v in schedule.items() if k.startswith("optimizer.")} == {
        **{"optimizer.lr": 0.5, "optimizer.weight_decay": 0.25},
    }


@pytest.mark.parametrize("limits", [[], [0, 4095]])
def test_what_a_config_with_a_range_says_of_its_data(limits):
    inner = {"instance_mask_format": "polygon"}
    mapper = {"limits": limits, "mapper": inner} if limits else inner
    heads = {"num_classes": 3, "mask_head": {}, "keypoint_head": {"num_keypoints": 7}}
    cfg = OmegaConf.create(
        {
            "model": {"roi_heads": heads, "num_classes": 9},
            "dataloader": {"train": {"mapper": mapper}, "evaluator": {}},
        }
    )
    assert checking._LazySetup(cfg).wanted(True) == Wanted(
        **{"classes": 3, "masks": True, "mask_format": "polygon", "keypoints": 7},
        **{"picture_range": limits, "classes_key": "model.roi_heads.num_classes"},
        **{"masks_key": "model.roi_heads.mask_head"},
        format_key="dataloader.train.mapper.instance_mask_format",
    )
    del cfg.model.roi_heads
    found = checking._LazySetup(cfg).wanted(True)
    assert (found.classes, found.masks, found.keypoints) == (9, False, 0)
    assert found.classes_key == "model.num_classes"


def test_the_milestones_that_would_fit_are_said(tmp_path):
    with pytest.raises(UsageError) as caught:
        checking._check_milestones(config(tmp_path, max_iter=44))
    assert str(caught.value) == (
        "train.max_iter 44 ends before lr_multiplier.scheduler.milestones [60, 80]: change both, "
        "for example lr_multiplier.scheduler.milestones=[30,40]"
    )
