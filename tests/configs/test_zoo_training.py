"""One YAML and one Python config of each family, shrunk, train and evaluate alike."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.data import MetadataCatalog, build_detection_train_loader
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    SimpleTrainer,
    create_ddp_model,
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
)
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from test_zoo import lazy_path, load_yaml

from wsbcn_d2.data.checks import Wanted
from wsbcn_d2.engine import Trainer, UsageError, lazy
from wsbcn_d2.engine.lazy import checking

FAMILIES = {
    "mask": "mask_rcnn_R_50_FPN_2x_bcn_ws_1img",
    "faster": "faster_rcnn_R_50_FPN_1x_gn_ws_2img",
    "cascade": "cascade_mask_rcnn_R_50_FPN_2x_bcn_ws_1img",
    "retinanet": "retinanet_R_50_FPN_1x_gn_ws_1img",
}


@pytest.fixture(params=FAMILIES)
def twins(request, tiny_shapes, tmp_path):
    """The YAML and the Python config of a family, both R-18 with narrow heads."""
    family = request.param
    name = FAMILIES[family]
    cfg = load_yaml(name)
    train, test = tiny_shapes["train"], tiny_shapes["val"]
    cfg.merge_from_list(
        [
            *TINY,
            *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "OUTPUT_DIR", str(tmp_path / "yaml")),
            *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
            *("MODEL.FPN.OUT_CHANNELS", 64),  # on one pixel, groups of one have nothing to norm
            *("MODEL.RESNETS.STEM_OUT_CHANNELS", 64, "MODEL.ROI_HEADS.NUM_CLASSES", 6),
            *("MODEL.RETINANET.NUM_CLASSES", 6, "MODEL.RETINANET.NUM_CONVS", 1),
            *("DATASETS.TRAIN", (train,), "DATASETS.TEST", (test,)),
            *("INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64),
            *("INPUT.MASK_FORMAT", "bitmask", "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0),
            *("SOLVER.MAX_ITER", 1, "SOLVER.STEPS", (), "SEED", 1),
        ]
    )
    return name, cfg, _lazy_twin(family, name, train, test, str(tmp_path / "lazy"))


def _lazy_twin(family, name, train, test, output):
    cfg = LazyConfig.load(str(lazy_path(name)))
    fpn = cfg.model.backbone.module
    fpn.bottom_up.stages.depth = 18
    fpn.out_channels = 64
    if family == "retinanet":
        fpn.top_block.in_channels = 512
        cfg.model.num_classes = 6
        cfg.model.test_score_thresh = 0.0
        cfg.model.max_detections_per_image = 5
        cfg.model.head.conv_dims = [64]
        for shape in cfg.model.head.input_shape:
            shape.channels = 64
    else:
        rpn, roi = cfg.model.proposal_generator, cfg.model.roi_heads
        rpn.head.in_channels = 64
        rpn.update(batch_size_per_image=16, pre_nms_topk=(50, 20), post_nms_topk=(20, 10))
        roi.num_classes = 6
        roi.batch_size_per_image = 8
        cascade = family == "cascade"
        for head in roi.box_heads if cascade else [roi.box_head]:
            head.update(conv_dims=[32], fc_dims=[32])
            head.input_shape.channels = 64
        for predictor in roi.box_predictors if cascade else [roi.box_predictor]:
            predictor.input_shape.channels = 32
            predictor.test_score_thresh = 0.0
            predictor.test_topk_per_image = 5
        if "mask_head" in roi:
            roi.mask_head.conv_dims = [32, 32]
            roi.mask_head.input_shape.channels = 64
    for loader, dataset in ((cfg.dataloader.train, train), (cfg.dataloader.test, test)):
        loader.dataset.names = dataset
        loader.num_workers = 0
        loader.mapper.augmentations[0].short_edge_length = 64
    cfg.dataloader.train.mapper.instance_mask_format = "bitmask"
    cfg.lr_multiplier.scheduler.update(values=[1.0], milestones=[])
    cfg.train.update(output_dir=output, init_checkpoint="", max_iter=1, device="cpu", seed=1)
    return cfg


def _losses(model, batch):
    torch.manual_seed(3)  # anchors and proposals are sampled
    with EventStorage():
        return model(batch)


def _most_batches(state_dict):
    return max(int(v) for k, v in state_dict.items() if k.endswith("bn.num_batches_tracked"))


def test_twins_are_one_model_and_train(twins):
    name, cfg, lazy_cfg = twins
    model, lazy_model = build_model(cfg), instantiate(lazy_cfg.model)
    lazy_model.load_state_dict(model.state_dict())
    torch.manual_seed(2)
    batch = next(iter(build_detection_train_loader(cfg)))
    losses, lazy_losses = _losses(model, batch), _losses(lazy_model, batch)
    assert set(losses) == set(lazy_losses)
    for key, value in losses.items():
        assert torch.isfinite(value)
        torch.testing.assert_close(lazy_losses[key], value, rtol=1e-5, atol=1e-6)

    tasks = {"bbox", "segm"} if "mask" in name else {"bbox"}
    trainer = Trainer(cfg)
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert set(trainer._last_eval_results) == tasks
    # One iteration for 4 processes is 4 for the one there is.
    assert trainer.max_iter == 4 and int(name[-4]) == trainer.cfg.SOLVER.IMS_PER_BATCH
    moved = [n for n, p in trainer.model.named_parameters() if not torch.equal(p, start[n])]
    assert {n.split(".")[0] for n in moved} == {n.split(".")[0] for n in start}

    lazy_cfg.train.bcn.first_batch_init = False
    assert set(lazy.train(lazy_cfg)) == tasks
    output = lazy_cfg.train.output_dir
    saved = torch.load(f"{output}/model_final.pth", weights_only=False)
    assert saved["iteration"] == 3
    assert set(saved["model"]) == set(model.state_dict())
    if "bcn" in name:  # four steps; where the first does not set the estimates, one more is counted
        assert _most_batches(trainer.model.state_dict()) == 4
        assert _most_batches(saved["model"]) == 5
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in saved["model"].values())


class StockTrainer(DefaultTrainer):
    """As in Detectron2's train_net.py."""

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        assert MetadataCatalog.get(dataset_name).evaluator_type == "coco"
        return COCOEvaluator(dataset_name, output_dir=output_folder or cfg.OUTPUT_DIR)


def stock_lazy(cfg):
    """What Detectron2's lazyconfig_train_net.py does with a config; the evaluation's results."""
    args = default_argument_parser().parse_args([])
    default_setup(cfg, args)
    model = instantiate(cfg.model)
    model.to(cfg.train.device)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = instantiate(cfg.dataloader.train)
    model = create_ddp_model(model, **cfg.train.ddp)
    trainer = (AMPTrainer if cfg.train.amp.enabled else SimpleTrainer)(model, loader, optimizer)
    checkpointer = DetectionCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    results = []

    def evaluate():
        found = inference_on_dataset(
            model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
        )
        results.append(found)
        return found

    writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer),
            hooks.EvalHook(cfg.train.eval_period, evaluate),
            hooks.PeriodicWriter(writers, period=cfg.train.log_period),
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=False)
    trainer.train(0, cfg.train.max_iter)
    return results


def test_twins_train_to_the_end_under_detectron2s_own_scripts(twins):
    name, cfg, lazy_cfg = twins
    tasks = {"bbox", "segm"} if "mask" in name else {"bbox"}
    default_setup(cfg, default_argument_parser().parse_args([]))
    trainer = StockTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert set(trainer._last_eval_results) == tasks
    lazy_cfg.train.eval_period = 1
    for results in stock_lazy(lazy_cfg):
        assert set(results) == tasks
    folder = Path(lazy_cfg.train.output_dir)
    assert (folder / "inference" / "coco_instances_results.json").is_file()
    assert (folder / "model_final.pth").is_file()


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location(
        "lazyconfig_train_net", ROOT / "tools" / "lazyconfig_train_net.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(tool, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["lazyconfig_train_net.py", *arguments])
    return tool.cli()


SHRUNK = [
    "model.backbone.module.bottom_up.freeze_at=0",
    "model.backbone.module.bottom_up.stages.depth=18",
    "model.backbone.module.out_channels=64",
    "model.backbone.module.top_block.in_channels=512",
    "model.head.conv_dims=[64]",
    *(f"model.head.input_shape.{i}.channels=64" for i in range(5)),
    "model.num_classes=6",
    "lr_multiplier.scheduler.values=[1.0]",
    "lr_multiplier.scheduler.milestones=[]",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "dataloader.train.mapper.instance_mask_format=bitmask",
    "dataloader.train.mapper.augmentations.0.short_edge_length=64",
    "dataloader.test.mapper.augmentations.0.short_edge_length=64",
    "train.init_checkpoint=",
    "train.max_iter=1",
    "train.device=cpu",
]


def test_tool_trains_resumes_and_evaluates(tool, tiny_shapes, tmp_path, monkeypatch, capsys):
    arguments = [
        *("--config-file", str(lazy_path(FAMILIES["retinanet"]))),
        *(*SHRUNK, f"train.output_dir={tmp_path}"),
        f"dataloader.train.dataset.names={tiny_shapes['train']}",
        f"dataloader.test.dataset.names={tiny_shapes['val']}",
    ]
    assert _run(tool, monkeypatch, *arguments) == 0
    final = tmp_path / "model_final.pth"
    assert (tmp_path / "config.yaml").is_file() and final.is_file()
    assert _run(tool, monkeypatch, "--resume", *arguments, "train.max_iter=2") == 0
    assert torch.load(final, weights_only=False)["iteration"] == 7  # eight steps in all, not twelve
    assert "Starting training from iteration 4\n" in (tmp_path / "log.txt").read_text()
    arguments += [f"train.init_checkpoint={final}"]
    assert _run(tool, monkeypatch, "--eval-only", *arguments) == 0
    assert not any(line.startswith("error") for line in capsys.readouterr().err.splitlines())


CONFIG = str(lazy_path(FAMILIES["mask"]))
FROM_SCRATCH = ["train.init_checkpoint=", "model.backbone.module.bottom_up.freeze_at=0"]
HERE = ["dataloader.train.dataset.names=shapes_train", "dataloader.test.dataset.names=shapes_val"]


@pytest.mark.parametrize(
    "arguments, culprit",
    [
        ([], "--config-file"),
        (["--config-file", "absent.py"], "absent.py"),
        (["--config-file", str(ROOT / "configs/lazy/common/zoo.py")], "defines no dataloader"),
        (["--config-file", CONFIG, "train.maxiter=3"], "max_iter"),
        (["--config-file", CONFIG, HERE[0], "train.max_iter=3", "train.maxiter=3"], "max_iter"),
        (["--config-file", CONFIG, "train.seed=1", "--eval-only"], "before"),
        (["--config-file", CONFIG, "nothing.here=3"], "nothing.here"),
        (["--config-file", CONFIG, "train.max_iter"], "KEY=VALUE"),
        (["--config-file", CONFIG, HERE[1]], "coco_2017_train"),
        (["--config-file", CONFIG, *HERE, "train.init_checkpoint=absent.pth"], "absent.pth"),
        (
            ["--config-file", CONFIG, *HERE, "dataloader.train.total_batch_size=3"],
            "total_batch_size",
        ),
        (["--config-file", CONFIG, *HERE, "train.bcn.update_rate=2"], "train.bcn"),
        (["--config-file", CONFIG, *HERE, "model.roi_heads.box_head.conv_norm=BNC"], "BNC"),
        (["--config-file", CONFIG, *HERE, "+train.accumulate=2"], "train.accumulate 2"),
        (["--config-file", CONFIG, *HERE, "optimizer.momentum=-1", *FROM_SCRATCH], "optimizer"),
        (["--config-file", CONFIG, *HERE, f"train.init_checkpoint={__file__}"], "checkpoint"),
        (
            ["--config-file", CONFIG, *HERE, "lr_multiplier.scheduler.values=[1,2]"],
            "lr_multiplier",
        ),
    ],
)
def test_wrong_input_is_one_line(tool, monkeypatch, tmp_path, capsys, arguments, culprit):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert _run(tool, monkeypatch, *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and culprit in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("there", [True, False])
def test_a_config_runs_on_the_cpu_where_there_is_no_gpu(there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert lazy.load_lazy_config(CONFIG).train.device == ("cuda" if there else "cpu")


@pytest.mark.parametrize("family", ["mask", "faster", "retinanet"])
def test_what_a_python_config_says_of_its_data(family):
    cfg = LazyConfig.load(str(lazy_path(FAMILIES[family])))
    cfg.dataloader.evaluator.kpt_oks_sigmas = [0.1] * 5
    inside = "model." if family == "retinanet" else "model.roi_heads."
    assert checking._LazySetup(cfg).wanted(training=True) == Wanted(
        classes=80,
        masks=family == "mask",
        mask_format=cfg.dataloader.train.mapper.get("instance_mask_format", "bitmask"),
        sigmas=5,
        classes_key=f"{inside}num_classes",
        masks_key="model.roi_heads.mask_head",
        format_key="dataloader.train.mapper.instance_mask_format",
        picture_range=[],
    )


@pytest.mark.parametrize(
    "saved, message",
    [
        (lambda model: {k: v for k, v in model.items() if "res4" not in k}, "backbone parameters"),
        (lambda model: {"unrelated.weight": torch.zeros(3)}, "backbone parameters"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_the_start(
    tool, monkeypatch, tmp_path, capsys, saved, message
):
    with torch.device("meta"):
        model = instantiate(LazyConfig.load(CONFIG).model)
    state = saved({k: torch.zeros(v.shape) for k, v in model.state_dict().items()})
    torch.save({"model": state}, tmp_path / "own.pth")
    weights = f"train.init_checkpoint={tmp_path / 'own.pth'}"
    output = tmp_path / "output"
    arguments = ["--config-file", CONFIG, *HERE, weights, f"train.output_dir={output}"]
    assert _run(tool, monkeypatch, *arguments) == 2
    # The loggers that an earlier run has set up write elsewhere in this process.
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert not output.exists()


def test_a_broken_config_does_not_leave_its_import_behind(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("from .absent import model\n")
    stock_import = __builtins__["__import__"]
    with pytest.raises(UsageError, match="broken.py"):
        lazy.load_lazy_config(str(broken))
    assert __builtins__["__import__"] is stock_import
