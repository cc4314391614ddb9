"""Image classification on Detectron2's engine: where a detector's pre-trained weights come from.

Official code of the recipe that is followed here:
https://github.com/joe-siyuan-qiao/Batch-Channel-Normalization, ``imagenet/``.

Deviation: the linear layer starts from N(0, 0.01), as Detectron2's ResNet makes it; the official
code leaves PyTorch's initialization.
"""

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.backbone import ResNet
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn import functional as F

__all__ = ["ImageClassifier", "with_linear_head", "zero_last_norms"]


def with_linear_head(backbone: Backbone, num_classes: int) -> ResNet:
    """A ResNet over the same stem and stages that ends in average pooling and a linear layer.

    Detectron2's ResNet has that head, but no builder of its own makes it. Its forward returns
    ``{"linear": logits}``; stem and blocks are shared, not copied.

    Raises:
        ValueError: for another backbone than a ResNet.
    """
    if not isinstance(backbone, ResNet):
        raise ValueError(
            f"an image classifier needs a ResNet, not {type(backbone).__name__}: set "
            "MODEL.BACKBONE.NAME to build_resnet_backbone or build_ws_resnet_backbone"
        )
    stages = [list(stage) for stage in backbone.stages]
    return ResNet(backbone.stem, stages, num_classes=num_classes)


def zero_last_norms(backbone: ResNet) -> None:
    """Zero the weight of the last norm of every residual block, in place.

    Each block then starts as the identity. In BCN it is the weight per group that is zeroed, as in
    the official code.
    """
    for stage in backbone.stages:
        for block in stage:
            last = block.conv3 if hasattr(block, "conv3") else block.conv2
            if not isinstance(last.norm, FrozenBatchNorm2d):
                nn.init.zeros_(last.norm.weight)


@META_ARCH_REGISTRY.register()
class ImageClassifier(nn.Module):
    """A ResNet with a linear head, softmax cross-entropy in training.

    The backbone's parameters have the names they have in a detector without FPN
    (``backbone.res2.0.conv1.weight``); ``WSBCNCheckpointer`` also puts them under an FPN.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        num_classes: int,
        pixel_mean: list[float],
        pixel_std: list[float],
        zero_init_last_norm: bool = False,
        input_format: str | None = None,
    ):
        """
        Args:
            backbone: a ResNet with all its stages.
            num_classes: number of classes.
            pixel_mean, pixel_std: one number per channel of the input images.
            zero_init_last_norm: see :func:`zero_last_norms`.
            input_format: channel order of the images; only recorded.

        Raises:
            ValueError: for another backbone than a ResNet, or no classes.
        """
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"MODEL.CLASSIFIER.NUM_CLASSES must be positive, not {num_classes}")
        self.backbone = with_linear_head(backbone, num_classes)
        if zero_init_last_norm:
            zero_last_norms(self.backbone)
        self.num_classes = num_classes
        self.input_format = input_format
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        # A classifier has all stages, whichever a detector would read.
        whole = cfg.clone()
        whole.defrost()
        whole.MODEL.RESNETS.OUT_FEATURES = ["res5"]
        return {
            "backbone": build_backbone(whole),
            "num_classes": cfg.MODEL.CLASSIFIER.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "zero_init_last_norm": cfg.MODEL.CLASSIFIER.ZERO_INIT_LAST_NORM,
            "input_format": cfg.INPUT.FORMAT,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]) -> dict | list[dict]:
        """
        Args:
            batched_inputs: one dict per image: ``image``, shape (C, H, W), the same for all; in
                training also ``label``, an int.

        Returns:
            In training, a dict of losses (scalars). Else one dict per image: ``pred_classes``
            (K,), int64, the K = min(5, num_classes) likeliest classes in order, and ``scores``
            (K,), their probabilities.

        Raises:
            ValueError: for images of different shapes.
        """
        logits = self.backbone(self.preprocess_image(batched_inputs))["linear"].float()
        if not self.training:
            scores, classes = logits.softmax(dim=1).topk(min(5, self.num_classes))
            return [{"pred_classes": c, "scores": s} for c, s in zip(classes, scores, strict=True)]
        labels = torch.tensor([x["label"] for x in batched_inputs], device=logits.device)
        correct = (logits.detach().argmax(dim=1) == labels).float().mean()
        get_event_storage().put_scalar("classifier/batch_top1", 100 * correct.item())
        return {"loss_cls": F.cross_entropy(logits, labels)}

    def preprocess_image(self, batched_inputs: list[dict]) -> torch.Tensor:
        """Normalize and stack: (N, C, H, W) on the model's device."""
        images = [x["image"] for x in batched_inputs]
        shapes = {tuple(image.shape) for image in images}
        if len(shapes) != 1:
            raise ValueError(
                f"images of one batch have different shapes, {sorted(shapes)}: the mapper of a "
                "classification data set crops them to INPUT.CLASSIFICATION.SIZE"
            )
        batch = torch.stack(images).to(self.device, non_blocking=True)
        return (batch - self.pixel_mean) / self.pixel_std
