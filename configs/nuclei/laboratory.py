"""Ways of moving BCN's estimates, and one contrast for all pictures: tried in the study, no more.

    tools/compare.py --import configs.nuclei.laboratory ... MODEL.RESNETS.NORM CompensatedBCN ...

Norms, each a BCN whose batch half is moved in its own way:
  * ``CompensatedBCN``: what an estimate moves by is put into the affine of the same channel, so
    that no move changes the function;
  * ``RefreshedBCN``: averages move on the side by the update rate; every 100 batches they become
    the estimates, which are held in between;
  * ``MeasuredBCN``: the estimates are the average of the first 100 batches so far, then held.

Data sets ``nuclei_contrast_{train,val}``: the pictures of ``nuclei`` in grey, dark background,
stretched to the whole range. ``python configs/nuclei/laboratory.py`` writes them.
"""

from pathlib import Path

import numpy as np
import torch
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from wsbcn_d2.data.names import is_free
from wsbcn_d2.data.shapes import default_root
from wsbcn_d2.layers import NORM_REGISTRY, BatchChannelNorm2d, EstimatedBatchNorm2d

PERIOD = 100  # batches


class Compensated(EstimatedBatchNorm2d):
    """Moves the estimates without changing the function."""

    @torch.no_grad()
    def update(self, x):
        mean, std = self.running_mean.clone(), (self.running_var + self.eps).sqrt()
        super().update(x)
        # Through .data: a layer that is used twice in a step has its weight kept by autograd.
        self.bias.data += self.weight * (self.running_mean - mean) / std
        self.weight.data *= (self.running_var + self.eps).sqrt() / std


class Refreshed(EstimatedBatchNorm2d):
    """Holds the estimates, and replaces them every ``PERIOD`` batches by averages."""

    @torch.no_grad()
    def update(self, x):
        held = self.running_mean, self.running_var
        self.running_mean, self.running_var = getattr(self, "_averages", None) or (
            held[0].clone(),
            held[1].clone(),
        )
        super().update(x)
        self._averages = self.running_mean, self.running_var
        self.running_mean, self.running_var = held
        if self.num_batches_tracked % PERIOD == 1:
            for estimate, average in zip(held, self._averages, strict=True):
                estimate.copy_(average)


class Measured(EstimatedBatchNorm2d):
    """Averages over the first ``PERIOD`` batches, then holds."""

    def update(self, x):
        if self.num_batches_tracked < PERIOD:
            rate, self.momentum = self.momentum, None
            super().update(x)
            self.momentum = rate


def _norm(kind):
    def make(channels):
        norm = BatchChannelNorm2d(channels)
        norm.bn = kind(channels)
        return norm

    make.__name__ = f"{kind.__name__}BCN"
    return make


def one_contrast(picture: np.ndarray) -> np.ndarray:
    """A picture of shape (H, W, 3), uint8, in grey, dark background, from 0 to 255."""
    grey = picture.mean(2)
    if np.median(grey) > 127:
        grey = 255 - grey
    low, high = np.percentile(grey, (1, 99.5))
    grey = (grey - low) / max(high - low, 1) * 255
    return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, 2)


def write_pictures() -> None:
    """Write the pictures of ``nuclei_contrast_{train,val}``."""
    for split in ("train", "val"):
        source, folder = (default_root() / name / split for name in ("nuclei", "nuclei_contrast"))
        folder.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            picture = one_contrast(np.asarray(Image.open(path).convert("RGB")))
            Image.fromarray(picture).save(folder / path.name)


for _kind in (Compensated, Refreshed, Measured):
    if f"{_kind.__name__}BCN" not in NORM_REGISTRY:
        NORM_REGISTRY.register(_norm(_kind))
for _split in ("train", "val"):
    if is_free(f"nuclei_contrast_{_split}", replace=False):
        register_coco_instances(
            f"nuclei_contrast_{_split}",
            {},
            str(Path(default_root(), "nuclei", "annotations", f"{_split}.json")),
            str(Path(default_root(), "nuclei_contrast", _split)),
        )

if __name__ == "__main__":
    write_pictures()
