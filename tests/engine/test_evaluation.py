"""The evaluator of a dataset follows its ``evaluator_type``."""

import sys
import types

import detectron2
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.structures import Boxes, Instances

from wsbcn_d2.engine import Trainer, build_evaluator, evaluation, trainer


@pytest.fixture
def dataset(tiny_shapes):
    """A dataset with all the metadata that any evaluator asks for."""
    source = MetadataCatalog.get(tiny_shapes["val"])
    name = "test_evaluators"
    metadata = MetadataCatalog.get(name).set(
        json_file=source.json_file,
        thing_classes=source.thing_classes,
        stuff_classes=["sky", "grass"],
        thing_dataset_id_to_contiguous_id=source.thing_dataset_id_to_contiguous_id,
        stuff_dataset_id_to_contiguous_id={1: 0, 2: 1},
        ignore_label=255,
        dirname="nowhere",
        split="test",
        year=2007,
    )

    def of_type(evaluator_type):
        metadata.evaluator_type = evaluator_type
        return name

    # The catalog wants every value set once; this one changes from case to case.
    metadata.__dict__.pop("evaluator_type", None)
    yield lambda kind: (metadata.__dict__.pop("evaluator_type", None), of_type(kind))[1]
    MetadataCatalog.remove(name)


@pytest.fixture(autouse=True)
def without_ground_truth(monkeypatch):
    monkeypatch.setattr(
        "detectron2.evaluation.sem_seg_evaluation.DatasetCatalog",
        types.SimpleNamespace(get=lambda name: []),
    )


@pytest.mark.parametrize(
    ("evaluator_type", "kinds"),
    [
        ("coco", [evaluation._COCOEvaluator]),
        ("sem_seg", [SemSegEvaluator]),
        ("coco_panoptic_seg", [SemSegEvaluator, evaluation._COCOEvaluator, COCOPanopticEvaluator]),
        ("cityscapes_instance", [CityscapesInstanceEvaluator]),
        ("cityscapes_sem_seg", [CityscapesSemSegEvaluator]),
        ("pascal_voc", [PascalVOCDetectionEvaluator]),
    ],
)
def test_by_type(tiny_cfg, dataset, tmp_path, evaluator_type, kinds):
    cfg = tiny_cfg("OUTPUT_DIR", str(tmp_path))
    evaluator = Trainer.build_evaluator(cfg, dataset(evaluator_type))
    parts = [evaluator]
    if len(kinds) > 1:
        assert type(evaluator) is DatasetEvaluators
        parts = evaluator._evaluators
    assert [type(part) for part in parts] == kinds
    folders = {part._output_dir for part in parts if hasattr(part, "_output_dir")}
    assert folders <= {str(tmp_path / "inference")}  # of whatever writes its predictions


def test_coco_is_evaluated_by_detectron2s_evaluator():
    assert evaluation._COCOEvaluator.__mro__[1] is COCOEvaluator


def test_classes_that_the_set_does_not_have_are_left_out(tiny_cfg, dataset, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(COCOEvaluator, "process", lambda self, i, o: seen.append(o))
    evaluator = build_evaluator(tiny_cfg("OUTPUT_DIR", str(tmp_path)), dataset("coco"))
    found = Instances((8, 8), pred_classes=torch.tensor([0, 5, 6, 7, 2]))
    boxes = Instances((8, 8), pred_boxes=Boxes(torch.zeros(2, 4)))
    evaluator.process([{}] * 3, [{"instances": found}, {"proposals": boxes}, {"instances": boxes}])
    first, second, third = seen[0]  # of six classes
    assert first["instances"].pred_classes.tolist() == [0, 5, 2]
    assert second == {"proposals": boxes} and third == {"instances": boxes}


def test_test_time_augmentation_has_results_of_its_own(tiny_cfg, dataset, tmp_path, monkeypatch):
    asked = []

    def test(cls, cfg, model, evaluators):
        asked.append((model, [e._output_dir for e in evaluators]))
        return {"bbox": {"AP": 1.0}, "segm": {"AP": 2.0}}

    monkeypatch.setattr(Trainer, "test", classmethod(test))
    monkeypatch.setattr(trainer, "GeneralizedRCNNWithTTA", lambda cfg, model: ("TTA", model))
    cfg = tiny_cfg("OUTPUT_DIR", str(tmp_path), "DATASETS.TEST", (dataset("coco"),))
    found = Trainer.test_with_TTA(cfg, "model")
    assert found == {"bbox_TTA": {"AP": 1.0}, "segm_TTA": {"AP": 2.0}}
    assert asked == [(("TTA", "model"), [str(tmp_path / "inference_TTA")])]


def test_lvis(tiny_cfg, dataset, tmp_path, monkeypatch):
    # Its API is a package of its own, which evaluation on LVIS needs and these tests do not.
    calls = []
    monkeypatch.setattr(evaluation, "LVISEvaluator", lambda *a, **k: calls.append((a, k)) or "LVIS")
    cfg = tiny_cfg("OUTPUT_DIR", str(tmp_path))
    assert build_evaluator(cfg, dataset("lvis")) == "LVIS"
    assert calls == [(("test_evaluators",), {"output_dir": str(tmp_path / "inference")})]


def test_results_go_to_the_folder_asked_for(tiny_cfg, dataset, tmp_path):
    cfg = tiny_cfg("OUTPUT_DIR", str(tmp_path))
    name = dataset("coco")
    assert build_evaluator(cfg, name)._output_dir == str(tmp_path / "inference")
    assert build_evaluator(cfg, name, str(tmp_path / "own"))._output_dir == str(tmp_path / "own")


@pytest.mark.parametrize("compiled", [True, False])
def test_coco_is_evaluated_fast_where_that_is_compiled(
    tiny_cfg, dataset, tmp_path, monkeypatch, compiled
):
    monkeypatch.setattr(evaluation, "has_compiled_ops", lambda: compiled)
    assert build_evaluator(None, dataset("coco"), str(tmp_path))._use_fast_impl is compiled


def test_keypoints_have_the_configs_sigmas(tiny_cfg, dataset, tmp_path):
    cfg = tiny_cfg("OUTPUT_DIR", str(tmp_path), "TEST.KEYPOINT_OKS_SIGMAS", [0.1, 0.2])
    assert list(build_evaluator(cfg, dataset("coco"))._kpt_oks_sigmas) == [0.1, 0.2]
    assert list(build_evaluator(None, dataset("coco"), str(tmp_path))._kpt_oks_sigmas) == []


def test_an_unknown_type_is_refused_with_the_valid_ones(tiny_cfg, dataset):
    with pytest.raises(ValueError, match="'test_evaluators'.*'own'.*coco, sem_seg.*lvis"):
        build_evaluator(tiny_cfg(), dataset("own"))
    with pytest.raises(ValueError, match="None"):
        build_evaluator(tiny_cfg(), "test_evaluators_unheard_of")


@pytest.mark.parametrize(
    ("file", "compiled"),
    [("/d2/_C.cpython-311.so", True), ("/d2/_C.py", False), (None, False)],
)
def test_the_fast_evaluation_is_used_where_it_is_compiled(monkeypatch, file, compiled):
    module = types.ModuleType("detectron2._C")
    module.__file__ = file
    # None in sys.modules makes the import fail, as without any extension module.
    monkeypatch.setitem(sys.modules, "detectron2._C", module if file else None)
    monkeypatch.setattr(detectron2, "_C", module, raising=False)
    if not file:
        monkeypatch.delattr(detectron2, "_C")
    assert evaluation.has_compiled_ops() is compiled
