"""The evaluator of a dataset, by its ``evaluator_type``; and that of image classifiers."""

import itertools
import os
from collections import OrderedDict
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.utils import comm

__all__ = ["TopKEvaluator", "build_evaluator"]

_MISSED = 1 << 30  # a rank beyond every k


class _COCOEvaluator(COCOEvaluator):
    """Leaves out objects of classes that the data set does not have, where Detectron2 stops."""

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        known = len(self._metadata.thing_classes)
        for output in outputs:
            found = output.get("instances")
            if found is not None and found.has("pred_classes"):
                output["instances"] = found[found.pred_classes < known]
        super().process(inputs, outputs)


def _coco_evaluator(name: str, folder: str, sigmas: Sequence[float]) -> DatasetEvaluator:
    return _COCOEvaluator(
        name, output_dir=folder, use_fast_impl=has_compiled_ops(), kpt_oks_sigmas=sigmas
    )


# evaluator_type -> factories (dataset name, output folder, keypoints' sigmas) -> evaluator
_EVALUATORS = {
    "coco": [_coco_evaluator],
    "sem_seg": [lambda name, folder, _: SemSegEvaluator(name, output_dir=folder)],
    "coco_panoptic_seg": [
        lambda name, folder, _: SemSegEvaluator(name, output_dir=folder),
        _coco_evaluator,
        lambda name, folder, _: COCOPanopticEvaluator(name, folder),
    ],
    "cityscapes_instance": [lambda name, folder, _: CityscapesInstanceEvaluator(name)],
    "cityscapes_sem_seg": [lambda name, folder, _: CityscapesSemSegEvaluator(name)],
    "pascal_voc": [lambda name, folder, _: PascalVOCDetectionEvaluator(name)],
    "classification": [lambda name, folder, _: TopKEvaluator(name)],
    "lvis": [lambda name, folder, _: LVISEvaluator(name, output_dir=folder)],
}


def has_compiled_ops() -> bool:
    """Whether Detectron2's C++ operators (and so its fast COCO evaluation) are there."""
    try:
        from detectron2 import _C
    except ImportError:
        return False
    # The pure-Python build has a module of that name that explains what is missing.
    return not getattr(_C, "__file__", ".py").endswith(".py")


def build_evaluator(
    cfg: CfgNode | None, dataset_name: str, output_folder: str | None = None
) -> DatasetEvaluator:
    """The evaluator(s) that Detectron2's ``tools/train_net.py`` uses for a dataset.

    Args:
        cfg: for ``OUTPUT_DIR`` and ``TEST.KEYPOINT_OKS_SIGMAS``; None with an output folder.
        dataset_name: a registered dataset.
        output_folder: where results are written; default ``OUTPUT_DIR/inference``.

    Returns:
        DatasetEvaluator.

    Raises:
        ValueError: if no evaluator is known for the dataset's ``evaluator_type``.
    """
    folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
    sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS if cfg is not None else ()
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in _EVALUATORS:
        raise ValueError(
            f"dataset {dataset_name!r} has the evaluator_type {kind!r}: set its metadata to one "
            f"of {', '.join(_EVALUATORS)}"
        )
    evaluators = [factory(dataset_name, folder, sigmas) for factory in _EVALUATORS[kind]]
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


class TopKEvaluator(DatasetEvaluator):
    """Top-1 and top-5 accuracy in percent, over all processes."""

    def __init__(self, dataset_name: str = ""):
        """
        Args:
            dataset_name: for messages.
        """
        self._name = dataset_name
        self.reset()

    def reset(self) -> None:
        self._ranks: list[int] = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """
        Args:
            inputs: dicts with ``label``.
            outputs: dicts with ``pred_classes``, likeliest first.
        """
        for record, output in zip(inputs, outputs, strict=True):
            classes = output["pred_classes"].tolist()
            label = record["label"]
            self._ranks.append(classes.index(label) if label in classes else _MISSED)

    def evaluate(self) -> OrderedDict | None:
        """
        Returns:
            OrderedDict: ``{"classification": {"top1": percent, "top5": percent}}``; None on other
            processes than the first.

        Raises:
            ValueError: if there was no image.
        """
        gathered = comm.gather(self._ranks)
        if not comm.is_main_process():
            return None
        ranks = list(itertools.chain(*gathered))
        if not ranks:
            raise ValueError(f"data set {self._name!r}: no image was evaluated")
        within = {f"top{k}": 100 * sum(r < k for r in ranks) / len(ranks) for k in (1, 5)}
        return OrderedDict(classification=within)
