"""ResNet-FPN with explicit norms and, where a formula is given, WS."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7

from wsbcn_d2.modeling import standardize
from wsbcn_d2.modeling.stages import make_resnet_stages


def resnet_fpn(
    depth,
    *,
    num_groups=1,
    width_per_group=64,
    norm,
    fpn_norm,
    ws_formula=None,
    stride_in_1x1=False,
    freeze_at=2,
    retinanet=False,
):
    """A lazy ``FPN``; with ``ws_formula``, inside a lazy ``standardize`` (its ``module``).

    Args:
        depth, num_groups, width_per_group, stride_in_1x1: see ``make_resnet_stages``.
        norm, fpn_norm: names or callables ``channels -> nn.Module``.
        ws_formula: None for plain convolutions.
        freeze_at: stages (the stem is the first) that are not trained.
        retinanet: P3-P7 rather than P2-P6.
    """
    features = ["res3", "res4", "res5"] if retinanet else ["res2", "res3", "res4", "res5"]
    top = L(LastLevelMaxPool)()
    if retinanet:
        top = L(LastLevelP6P7)(in_channels=2048, out_channels="${..out_channels}")
    fpn = L(FPN)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=64, norm=norm),
            stages=L(make_resnet_stages)(
                depth=depth,
                num_groups=num_groups,
                width_per_group=width_per_group,
                stride_in_1x1=stride_in_1x1,
                norm=norm,
            ),
            out_features=features,
            freeze_at=freeze_at,
        ),
        in_features="${.bottom_up.out_features}",
        out_channels=256,
        norm=fpn_norm,
        top_block=top,
    )
    return L(standardize)(module=fpn, ws_formula=ws_formula) if ws_formula else fpn
