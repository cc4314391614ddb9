"""What holds where nothing is said: the defaults of everything public."""

import importlib
import inspect

import pytest
from test_types import MODULES, functions

from wsbcn_d2.checkpoint import Options, convert, convert_file

# Who moves one of them moves it for everybody who has relied on it.
DEFAULTS = {
    "checkpoint.checkpointer.WSBCNCheckpointer.__init__": {"save_dir": ""},
    "checkpoint.conversion.Options.__init__": {"target": "fpn", "source_name": ""},
    "checkpoint.conversion.write_checkpoint": {"heuristics": False},
    "checkpoint.formats.plain_bn.batch_norm_to_bcn": {"num_groups": 32},
    "checkpoint.metadata.Metadata.__init__": {"presumed": ()},
    "checkpoint.report.ConversionReport.__init__": {"detector": ""},
    "checkpoint.saving.AtomicSaving.resume_or_load": {"resume": True},
    "checkpoint.saving.usable_checkpoints": {"needed": ()},
    "config.load_config": {"opts": ()},
    "config.refusing": {"mend": ""},
    "data.checks.findings.Fault.__init__": {"count": 1, "test_only": False},
    "data.checks.findings.Findings.fault": {"test_only": False},
    "data.checks.findings.Findings.refuse": {"test": True},
    "data.checks.findings.Findings.serious": {"test": True},
    "data.checks.fit.Wanted.__init__": {
        "masks": False,
        "mask_format": "bitmask",
        "keypoints": 0,
        "sigmas": 0,
        "flip": False,
        "picture_range": (),
        "classes_key": "MODEL.ROI_HEADS.NUM_CLASSES",
        "masks_key": "MODEL.MASK_ON",
        "format_key": "INPUT.MASK_FORMAT",
    },
    "data.checks.look.look_at": {"decode": False},
    "data.checks.pictures.check_pictures": {"decode": False},
    "data.classification.augmentation.PadAndCrop.__init__": {"padding": 4},
    "data.classification.augmentation.RandomResizedCrop.__init__": {
        "scale": (0.08, 1.0),
        "ratio": (0.75, 4 / 3),
    },
    "data.classification.mapper.ClassificationMapper.from_config": {"is_train": True},
    "data.classification.sources.load_image_folder": {"name": "image folder"},
    "data.drawing.draw_some": {"count": 6, "limits": ()},
    "data.mask_folders.prepare_mask_folders": {"category": "nucleus", "val_share": 0.2},
    "data.picture_range.read_picture": {"limits": ()},
    "data.shapes.crops.object_crops": {"margin": 1.3},
    "data.shapes.register.register_shapes_split": {
        "split": "train",
        "num_images": 16,
        "seed": 0,
        "image_size": (112, 144),
    },
    "data.shapes.render.render_scene": {"num_objects": (1, 5), "scale": (0.25, 0.6)},
    "data.shapes.write.ShapesSpec.__init__": {
        "splits": (("train", 1600), ("val", 200)),
        "seed": 0,
        "image_size": (112, 144),
    },
    "data.shapes.write.write_shapes": {"seed": 0, "image_size": (112, 144)},
    "engine.checks.from_yaml.check_config": {"world_size": 1, "eval_only": False, "resume": False},
    "engine.checks.setup.Keys.__init__": {
        "train": "DATASETS.TRAIN",
        "test": "DATASETS.TEST",
        "images": "SOLVER.IMS_PER_BATCH",
        "reference": "SOLVER.REFERENCE_WORLD_SIZE",
        "accumulate": "SOLVER.ACCUMULATE",
        "recompute": "MODEL.RECOMPUTE",
        "weights": "MODEL.WEIGHTS",
        "freeze": "MODEL.BACKBONE.FREEZE_AT",
        "estimates": "MODEL.BCN",
        "output_dir": "OUTPUT_DIR",
    },
    "engine.checks.setup.check_setup": {"world_size": 1, "eval_only": False, "resume": False},
    "engine.curves.plot_curves": {"title": ""},
    "engine.evaluation.TopKEvaluator.__init__": {"dataset_name": ""},
    "engine.from_config.estimate_hooks": {
        "update_rate_schedule": "constant",
        "sync_estimates": True,
        "monitor_period": 0,
    },
    "engine.hooks.ResumedSchedule.__init__": {"take": "checkpoint", "key": "SOLVER.ON_RESUME"},
    "engine.hooks.UpdateRateSchedule.__init__": {"schedule": "constant"},
    "engine.lazy.checking.check_lazy_config": {
        "world_size": 1,
        "eval_only": False,
        "resume": False,
    },
    "engine.lazy.reading.load_lazy_config": {"overrides": ()},
    "engine.lazy.training.train": {"resume": False},
    "engine.monitor.ChannelMonitor.__init__": {"window": 8, "threshold": 0.99},
    "files.progress": {"period": 30.0},
    "layers.batch_channel_norm.BatchChannelNorm2d.__init__": {
        "num_groups": 32,
        "eps": 1e-05,
        "statistics": "estimated",
        "update_rate": 0.01,
    },
    "layers.estimated_batch_norm.EstimatedBatchNorm2d.__init__": {
        "eps": 1e-05,
        "momentum": 0.01,
        "affine": True,
    },
    "layers.reparametrized_conv.ReparametrizedConv2d.convert": {
        "formula": "unbiased",
        "eps": 1e-05,
    },
    "layers.weight_normalization.WNConv2d.__init__": {"ws_eps": 1e-05},
    "layers.weight_normalization.convert_convs": {
        "kind": "ws",
        "formula": "unbiased",
        "eps": 1e-05,
    },
    "layers.weight_normalization.normalize_weight": {"centred": False, "eps": 1e-05},
    "layers.weight_standardization.WSConv2d.__init__": {"ws_formula": "unbiased", "ws_eps": 1e-05},
    "layers.weight_standardization.standardize_weight": {"formula": "unbiased", "eps": 1e-05},
    "model_zoo.get": {"trained": False},
    "model_zoo.get_config": {"trained": False},
    "modeling.build.standardize": {
        "ws_kind": "ws",
        "ws_formula": "unbiased",
        "ws_eps": 1e-05,
        "parts": (),
    },
    "modeling.classifier.ImageClassifier.__init__": {"zero_init_last_norm": False},
    "modeling.parts.set_estimates": {"first_batch_init": True},
    "modeling.parts.standardize_parts": {"kind": "ws", "formula": "unbiased", "eps": 1e-05},
    "modeling.retinanet.WSRetinaNetHead.__init__": {
        "norm": "",
        "ws_kind": "ws",
        "ws_formula": "unbiased",
        "ws_eps": 1e-05,
    },
    "modeling.stages.make_resnet_stages": {
        "num_groups": 1,
        "width_per_group": 64,
        "stride_in_1x1": False,
    },
    "predictor.Predictor.__init__": {"fold": False},
    "predictor.Predictor.draw": {"scale": 1.0},
    "predictor.Predictor.from_checkpoint": {"opts": (), "fold": False},
    "predictor.draw_predictions": {"num_images": 6, "min_score": 0.5, "scale": 3},
    "safe_yaml.SafeCfgNode.load_yaml_with_base": {"allow_unsafe": False},
    "safe_yaml.SafeCfgNode.merge_from_file": {"allow_unsafe": False, "allow_remote": False},
    "study.plan.flatten": {"prefix": ""},
    "study.plan.make_plan": {
        "images_per_step": (),
        "seeds": (1,),
        "sweeps": (),
        "evaluations": 5,
        "opts": (),
    },
    "study.report.write_report": {"missing": (), "strip": ""},
    "study.runner.child_command": {"modules": (), "pictures": 0},
    "study.runner.run_all": {"jobs": 1, "keep_checkpoints": False, "poll_seconds": 1.0},
}


def plain(value):
    """A value that is written down: no None, no function, no factory of a list."""
    return isinstance(value, (bool, int, float, str, tuple))


def of(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if plain(p.default)}


@pytest.fixture(scope="module")
def found():
    result = {}
    for module in map(importlib.import_module, MODULES):
        for name in getattr(module, "__all__", ()):
            public = getattr(module, name)
            if getattr(public, "__module__", "").startswith("wsbcn_d2"):
                for function in functions(public):
                    place = function.__module__.removeprefix("wsbcn_d2.")
                    result[f"{place}.{function.__qualname__}"] = of(function)
    return {name: defaults for name, defaults in result.items() if defaults}


def test_nothing_public_has_another_default(found):
    wrong = {n for n in found.keys() | DEFAULTS.keys() if found.get(n) != DEFAULTS.get(n)}
    assert not wrong, {name: found.get(name) for name in wrong}


def test_a_conversion_is_told_nothing_unless_it_is():
    for function in (convert, convert_file):
        assert inspect.signature(function).parameters["options"].default == Options()
    assert vars(Options()) == {
        **{"target": "fpn", "format": None, "norm": None, "formula": None, "source_name": ""}
    }
