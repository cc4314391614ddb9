"""Weight standardization and batch-channel normalization for Detectron2.

``import wsbcn_d2`` registers the norms (``NORM: "BCN"``), the ``build_ws_*`` backbones, the
``WS*`` heads and the ``shapes`` dataset. After *Micro-Batch Training with Batch-Channel
Normalization and Weight Standardization*, Qiao et al., arXiv 1903.10520v2.
"""

try:
    import detectron2 as _detectron2  # noqa: F401  (only to fail early, with the mend)
except ImportError as error:
    raise ImportError(
        "wsbcn_d2 needs Detectron2, which is not importable here: run "
        "`python tools/install/install_detectron2.py` from this project's checkout"
    ) from error

from . import checkpoint as _checkpoint  # noqa: F401  (registers wsbcn:// names)
from . import data as _data  # noqa: F401  (registers the shapes dataset)
from .config import add_wsbcn_config, get_cfg
from .folding import fold
from .layers import (
    NORM_REGISTRY,
    BatchChannelNorm2d,
    EstimatedBatchNorm2d,
    WSConv2d,
    register_norms,
    set_update_rate,
    skip_first_batch_init,
    standardize_weight,
    unregister_norms,
)
from .modeling import (
    WSFastRCNNConvFCHead,
    WSMaskRCNNConvUpsampleHead,
    WSRes5ROIHeads,
    build_ws_resnet_backbone,
    build_ws_resnet_fpn_backbone,
    build_ws_retinanet_resnet_fpn_backbone,
)

__version__ = "0.1.0"

__all__ = [
    "NORM_REGISTRY",
    "BatchChannelNorm2d",
    "EstimatedBatchNorm2d",
    "WSConv2d",
    "WSFastRCNNConvFCHead",
    "WSMaskRCNNConvUpsampleHead",
    "WSRes5ROIHeads",
    "add_wsbcn_config",
    "build_ws_resnet_backbone",
    "build_ws_resnet_fpn_backbone",
    "build_ws_retinanet_resnet_fpn_backbone",
    "fold",
    "get_cfg",
    "register_norms",
    "set_update_rate",
    "skip_first_batch_init",
    "standardize_weight",
    "unregister_norms",
]

register_norms()
