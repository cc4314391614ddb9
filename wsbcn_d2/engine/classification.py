"""Evaluation of image classifiers."""

import itertools
from collections import OrderedDict

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

__all__ = ["TopKEvaluator"]

_MISSED = 1 << 30  # a rank beyond every k


class TopKEvaluator(DatasetEvaluator):
    """Top-1 and top-5 accuracy in percent, over all processes."""

    def __init__(self, dataset_name: str = ""):
        """
        Args:
            dataset_name: for messages.
        """
        self._name = dataset_name
        self.reset()

    def reset(self):
        self._ranks: list[int] = []

    def process(self, inputs, outputs):
        """
        Args:
            inputs: dicts with ``label``.
            outputs: dicts with ``pred_classes``, likeliest first.
        """
        for record, output in zip(inputs, outputs, strict=True):
            classes = output["pred_classes"].tolist()
            label = record["label"]
            self._ranks.append(classes.index(label) if label in classes else _MISSED)

    def evaluate(self):
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
