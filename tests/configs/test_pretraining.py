"""Pre-training end to end: train, evaluate, resume, and go on as a detector's backbone."""

import pytest
import torch
from conftest import ROOT, TINY
from detectron2.modeling import build_model
from detectron2.utils import comm

from wsbcn_d2.checkpoint import METADATA_KEY, CheckpointError, LoadExpectation, WSBCNCheckpointer
from wsbcn_d2.checkpoint.placement import place_backbone
from wsbcn_d2.engine import Trainer, UsageError, check_config, load_config
from wsbcn_d2.engine.evaluation import TopKEvaluator

CLASSIFIER = str(ROOT / "configs" / "shapes" / "classifier_R_18_bcn_ws.yaml")
DETECTOR = str(ROOT / "configs" / "shapes" / "mask_rcnn_R_18_FPN_bcn_ws.yaml")


@pytest.fixture
def checkpoint(classifier_cfg, tmp_path):
    """A classifier's checkpoint with random weights and estimates; returns (path, model)."""
    cfg = classifier_cfg()
    model = build_model(cfg)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.uniform_(0.5, 1.5)
    saver = WSBCNCheckpointer(model, str(tmp_path), expected=LoadExpectation.from_model(model, cfg))
    saver.save("classifier")
    return str(tmp_path / "classifier.pth"), model


def test_train_evaluate_resume(crops_options, monkeypatch):
    cfg = load_config(CLASSIFIER, crops_options)
    check_config(cfg)
    trainer = Trainer(cfg)
    trainer.train()
    results = trainer._last_eval_results
    assert results["classification"].keys() == {"top1", "top5"}
    assert 0 <= results["classification"]["top1"] <= results["classification"]["top5"] <= 100
    saved = torch.load(f"{cfg.OUTPUT_DIR}/model_final.pth", weights_only=True)
    assert saved[METADATA_KEY]["norm"] == "BCN" and saved[METADATA_KEY]["ws_formula"] == "unbiased"
    assert saved[METADATA_KEY]["pixel_mean"] == [123.675, 116.28, 103.53]
    assert saved["iteration"] == 1

    longer = load_config(
        CLASSIFIER, [*crops_options, "SOLVER.MAX_ITER", "3", "SOLVER.ACCUMULATE", "2"]
    )
    resumed = Trainer(longer)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, saved["model"][name]), name
    calls = []
    resumed.model.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(Trainer, "test", classmethod(lambda *_: {}))
    resumed.train()
    assert len(calls) == 2  # one step of two micro-batches
    assert resumed.iter == 3 or resumed.iter == 2


@pytest.mark.parametrize(
    "overrides,prefix",
    [
        ([], "backbone.bottom_up."),
        (
            [
                *("MODEL.BACKBONE.NAME", "build_ws_resnet_backbone"),
                *("MODEL.META_ARCHITECTURE", "ProposalNetwork"),
                *("MODEL.RPN.IN_FEATURES", "['res4']", "MODEL.RESNETS.OUT_FEATURES", "['res4']"),
                *("MODEL.ANCHOR_GENERATOR.SIZES", "[[32]]"),
            ],
            "backbone.",
        ),
    ],
)
def test_a_detector_takes_every_backbone_key(overrides, prefix, checkpoint):
    path, classifier = checkpoint
    cfg = load_config(DETECTOR, [*TINY, "MODEL.RESNETS.STEM_OUT_CHANNELS", "64", *overrides])
    model = build_model(cfg)
    WSBCNCheckpointer(model, expected=LoadExpectation.from_model(model, cfg)).load(path)
    source = {n.removeprefix("backbone."): v for n, v in classifier.state_dict().items()}
    own = model.state_dict()
    parts = ("stem", "res2", "res3", "res4", "res5")
    backbone = [n for n in own if n.startswith(tuple(prefix + part for part in parts))]
    assert len(backbone) >= 100
    for name in backbone:
        assert torch.equal(own[name], source[name.removeprefix(prefix)]), name


def test_a_c4_detector_takes_res5_for_its_head(classifier_cfg):
    options = ["MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.RES2_OUT_CHANNELS", "256"]
    cfg = load_config(
        DETECTOR,
        [
            *TINY,
            *(*options, "MODEL.BACKBONE.NAME", "build_ws_resnet_backbone"),
            *("MODEL.RESNETS.STEM_OUT_CHANNELS", "64", "MODEL.RESNETS.OUT_FEATURES", "['res4']"),
            *("MODEL.RPN.IN_FEATURES", "['res4']", "MODEL.ROI_HEADS.IN_FEATURES", "['res4']"),
            *("MODEL.ROI_HEADS.NAME", "WSRes5ROIHeads", "MODEL.ANCHOR_GENERATOR.SIZES", "[[32]]"),
            *("MODEL.DEVICE", "meta"),
        ],
    )
    with torch.device("meta"):
        classifier = build_model(classifier_cfg(*options, "MODEL.DEVICE", "meta")).state_dict()
        detector = build_model(cfg).state_dict()
    placed = place_backbone(classifier, detector)
    backbone = [n for n in detector if n.startswith(("backbone.", "roi_heads.res5."))]
    assert len(backbone) == 424  # 53 convolutions, and 7 entries per BCN
    assert all(placed[name].shape == detector[name].shape for name in backbone)
    assert "roi_heads.res5.0.shortcut.weight" in backbone
    # A detector's own names stay where they are.
    assert place_backbone(detector, detector).keys() == detector.keys()


@pytest.mark.parametrize(
    "stem,res5", [("backbone.bottom_up.",) * 2, ("backbone.", "roi_heads."), ("", "")]
)
def test_a_c4_detectors_resnet_is_placed_like_any(stem, res5):
    """All four entries arrive, what a model lacks under its old name."""
    names = "stem.conv1.weight", "res5.0.conv1.weight"
    own = [stem + names[0], res5 + names[1]]
    rest = [
        "backbone.stem.conv1.norm.num_batches_tracked",
        "roi_heads.box_predictor.cls_score.bias",
    ]
    state = {"backbone." + names[0]: 0, "roi_heads." + names[1]: 1, rest[0]: 2, rest[1]: 3}
    placed = place_backbone(state, own)
    assert placed == {own[0]: 0, own[1]: 1, rest[0]: 2, rest[1]: 3}


def test_a_classifier_of_other_classes_takes_all_but_the_linear_layer(checkpoint, classifier_cfg):
    path, classifier = checkpoint
    other = build_model(classifier_cfg("MODEL.CLASSIFIER.NUM_CLASSES", 3))
    before = other.backbone.linear.weight.clone()
    WSBCNCheckpointer(other).load(path)
    assert torch.equal(
        other.backbone.res5[1].conv2.weight, classifier.backbone.res5[1].conv2.weight
    )
    assert torch.equal(other.backbone.linear.weight, before)


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["MODEL.WS.FORMULA", "biased"], "trained with WS formula 'unbiased'.*'biased'"),
        (["MODEL.RESNETS.NORM", "GN"], "backbone with BCN but the model's has GN"),
        (["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"], "'none'.*build_ws_resnet"),
        (["MODEL.RESNETS.DEPTH", "34"], "backbone parameters"),
    ],
)
def test_a_detector_that_does_not_fit_is_refused(overrides, message, checkpoint):
    options = [*TINY, "MODEL.RESNETS.STEM_OUT_CHANNELS", "64", *overrides]
    cfg = load_config(DETECTOR, options)
    model = build_model(cfg)
    with pytest.raises(CheckpointError, match=message):
        WSBCNCheckpointer(model, expected=LoadExpectation.from_model(model, cfg)).load(
            checkpoint[0]
        )


def test_other_pixel_statistics_are_warned_about(checkpoint, caplog):
    options = [*TINY, "MODEL.RESNETS.STEM_OUT_CHANNELS", "64", "MODEL.PIXEL_STD", "[1.0,1.0,1.0]"]
    cfg = load_config(DETECTOR, options)
    model = build_model(cfg)
    checkpointer = WSBCNCheckpointer(model, expected=LoadExpectation.from_model(model, cfg))
    warnings = []
    checkpointer.logger = type("Log", (), {"info": print, "warning": warnings.append})()
    checkpointer.load(checkpoint[0])
    assert any("MODEL.PIXEL_STD" in line for line in warnings)


def test_absent_data_is_refused_before_anything_is_written(tmp_path, crops_options):
    options = [*crops_options, "DATASETS.TRAIN", "('cifar10_train',)"]
    with pytest.raises(UsageError, match="cifar10_train.*absent.*cifar-10-batches-py"):
        check_config(load_config(CLASSIFIER, options))


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["SOLVER.ACCUMULATE", "5"], "ACCUMULATE 5 cannot split the 4 images.*1 to 4"),
        (["SOLVER.ACCUMULATE", "0"], "ACCUMULATE 0 cannot split"),
        (["SOLVER.REFERENCE_WORLD_SIZE", "2", "SOLVER.ACCUMULATE", "3"], "split the 2 images"),
        (["INPUT.CLASSIFICATION.TRAIN_CROP", "any"], "unknown INPUT.CLASSIFICATION.TRAIN_CROP"),
        (["INPUT.CLASSIFICATION.RESIZE_TEST", "31"], "RESIZE_TEST 31 leaves no square"),
        (["MODEL.CLASSIFIER.NUM_CLASSES", "0"], "NUM_CLASSES must be positive"),
        (["MODEL.WS.KIND", "any"], "unknown MODEL.WS.KIND 'any'"),
    ],
)
def test_wrong_options_are_refused_in_one_line(overrides, message, crops_options):
    with pytest.raises(UsageError, match=message) as error:
        check_config(load_config(CLASSIFIER, [*crops_options, *overrides]))
    assert "\n" not in str(error.value)


def test_a_classifiers_checkpoint_passes_the_check_of_a_detectors_config(checkpoint):
    options = [*TINY, "MODEL.RESNETS.STEM_OUT_CHANNELS", "64", "MODEL.WEIGHTS", checkpoint[0]]
    check_config(load_config(DETECTOR, options))
    with pytest.raises(CheckpointError, match="BCN but the model's has GN"):
        check_config(load_config(DETECTOR, [*options, "MODEL.RESNETS.NORM", "GN"]))


# The evaluator.


def test_top_k():
    evaluator = TopKEvaluator("some")
    for label, classes in ((3, [3, 1]), (1, [3, 1]), (0, [5, 4, 3, 2, 0]), (9, [5, 4, 3, 2, 0])):
        evaluator.process([{"label": label}], [{"pred_classes": torch.tensor(classes)}])
    assert evaluator.evaluate() == {"classification": {"top1": 25.0, "top5": 75.0}}
    evaluator.reset()
    for label in range(7):  # the sixth and seventh places are beyond
        evaluator.process([{"label": label}], [{"pred_classes": torch.arange(7)}])
    found = evaluator.evaluate()["classification"]
    assert found == {"top1": pytest.approx(100 / 7), "top5": pytest.approx(500 / 7)}
    evaluator.reset()
    with pytest.raises(ValueError, match="'some': no image"):
        evaluator.evaluate()


def test_top_k_counts_the_images_of_all_processes(monkeypatch):
    evaluator = TopKEvaluator()
    evaluator.process([{"label": 1}], [{"pred_classes": torch.tensor([1])}])
    monkeypatch.setattr(comm, "gather", lambda mine: [mine, [2, 7, 0]])
    assert evaluator.evaluate()["classification"] == {"top1": 50.0, "top5": 75.0}
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert evaluator.evaluate() is None
