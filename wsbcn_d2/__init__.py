"""Weight standardization and batch-channel normalization for Detectron2.

``import wsbcn_d2`` registers the norms (``NORM: "BCN"``), the ``build_ws_*`` backbones, the
``WS*`` heads and the ``shapes`` dataset. After *Micro-Batch Training with Batch-Channel
Normalization and Weight Standardization*, Qiao et al., arXiv 1903.10520v2.

Where to look, bottom to top; nothing imports from further down this list:

- whole files, locks, progress bars: ``wsbcn_d2/files.py`` (replacing)
- the formulas of WS: ``wsbcn_d2/layers/weight_standardization.py`` (standardize_weight)
- the convolution that uses them: ``wsbcn_d2/layers/weight_standardization.py`` (WSConv2d)
- weight normalization and centred weight normalization: ``wsbcn_d2/layers/weight_normalization.py``
- the norm on running estimates: ``wsbcn_d2/layers/estimated_batch_norm.py`` (EstimatedBatchNorm2d)
- batch-channel normalization: ``wsbcn_d2/layers/batch_channel_norm.py`` (BatchChannelNorm2d)
- a norm's name in a config: ``wsbcn_d2/layers/registry.py`` (NORM_REGISTRY)
- how the layers run fast: ``wsbcn_d2/layers/kernels/dispatch.py``
- the reading of a YAML config: ``wsbcn_d2/safe_yaml.py`` (SafeCfgNode)
- a config key: ``wsbcn_d2/config.py`` (add_wsbcn_config)
- a model without WS and BCN that computes the same: ``wsbcn_d2/folding.py`` (fold)
- a backbone's name in a config: ``wsbcn_d2/modeling/backbone.py`` (build_ws_resnet_backbone)
- a head: ``wsbcn_d2/modeling/roi_heads.py`` (WSFastRCNNConvFCHead)
- which convolutions carry WS: ``wsbcn_d2/modeling/build.py``
- WS in any model by names of its parts: ``wsbcn_d2/modeling/parts.py`` (standardize_parts)
- what backward computes again: ``wsbcn_d2/modeling/recomputation.py`` (recompute)
- the format of someone's checkpoint: ``wsbcn_d2/checkpoint/formats/recognise.py`` (FORMATS)
- a published file and where it comes from: ``wsbcn_d2/checkpoint/catalog/entries.py`` (CATALOG)
- the reading of strangers' checkpoints: ``wsbcn_d2/checkpoint/files/opening.py`` (read_file)
- what is checked at loading: ``wsbcn_d2/checkpoint/checkpointer.py`` (WSBCNCheckpointer)
- the embedded data set: ``wsbcn_d2/data/shapes`` (ensure_shapes)
- a picture's way into a classifier: ``wsbcn_d2/data/classification`` (ClassificationMapper)
- a data set of one's own: ``wsbcn_d2/data/coco.py`` (register_coco_sets)
- what is looked at in it: ``wsbcn_d2/data/checks`` (look_at)
- what is checked before a run: ``wsbcn_d2/engine/checks`` (check_setup)
- the training from YAML: ``wsbcn_d2/engine/trainer.py`` (Trainer)
- the training from a Python config: ``wsbcn_d2/engine/lazy`` (train)
- a hook: ``wsbcn_d2/engine/hooks.py`` (EstimateSync)
- predictions for a picture: ``wsbcn_d2/predictor.py`` (Predictor)
- comparisons over seeds, their tables and plots: ``wsbcn_d2/study/plan.py``
- the configs and models by name, in a notebook: ``wsbcn_d2/model_zoo.py`` (get)
- what a command does: ``wsbcn_d2/cli`` (train)
- a config: ``configs/README.md``
- a command: ``tools/README.md``
- a test: ``tests/README.md``
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
from . import model_zoo
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
from .predictor import Predictor

__version__ = "0.1.0"

__all__ = [
    "NORM_REGISTRY",
    "BatchChannelNorm2d",
    "EstimatedBatchNorm2d",
    "Predictor",
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
    "model_zoo",
    "register_norms",
    "set_update_rate",
    "skip_first_batch_init",
    "standardize_weight",
    "unregister_norms",
]

register_norms()
