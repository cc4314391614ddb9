"""Data, optimizer and schedule of the authors' release, on 4 GPUs."""

import torch
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data import transforms as T
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler

from wsbcn_d2.engine import build_evaluator
from wsbcn_d2.layers import DEFAULT_UPDATE_RATE

GPUS = 4
WARMUP_ITERS = 500


def coco(*, total_batch_size, image_format, mask):
    """Loaders and evaluator for COCO 2017 at a single scale.

    Args:
        total_batch_size: images per step, over all GPUs.
        image_format: "RGB" or "BGR": that of the backbone's weights.
        mask: whether masks are loaded.
    """
    resize = dict(short_edge_length=800, max_size=1333)
    return dict(
        train=L(build_detection_train_loader)(
            dataset=L(get_detection_dataset_dicts)(names="coco_2017_train"),
            mapper=L(DatasetMapper)(
                is_train=True,
                augmentations=[
                    L(T.ResizeShortestEdge)(sample_style="choice", **resize),
                    L(T.RandomFlip)(),
                ],
                image_format=image_format,
                use_instance_mask=mask,
                instance_mask_format="polygon",
            ),
            total_batch_size=total_batch_size,
            num_workers=4,
        ),
        test=L(build_detection_test_loader)(
            dataset=L(get_detection_dataset_dicts)(names="coco_2017_val", filter_empty=False),
            mapper=L(DatasetMapper)(
                is_train=False,
                augmentations=[L(T.ResizeShortestEdge)(**resize)],
                image_format=image_format,
            ),
            num_workers=4,
        ),
        evaluator=L(build_evaluator)(
            cfg=None,
            dataset_name="${..test.dataset.names}",
            output_folder="${train.output_dir}/inference",
        ),
    )


def sgd(lr):
    """SGD in which biases take steps of twice the length and do not decay, and norms do."""
    return L(torch.optim.SGD)(
        params=L(get_default_optimizer_params)(
            base_lr="${..lr}", weight_decay_norm=1e-4, weight_decay_bias=0.0, bias_lr_factor=2.0
        ),
        lr=lr,
        momentum=0.9,
        weight_decay=1e-4,
    )


def multi_step(steps, max_iter):
    """Learning-rate factors: linear warm-up from a third, a tenth after each step."""
    return L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(
            values=[1.0, 0.1, 0.01], milestones=steps, num_updates="${train.max_iter}"
        ),
        warmup_factor=1 / 3,
        warmup_length=WARMUP_ITERS / max_iter,
        warmup_method="linear",
    )


def train_options(*, weights, max_iter, precise_bn):
    """What ``tools/lazyconfig_train_net.py`` reads as ``train``."""
    return dict(
        output_dir="./output",
        init_checkpoint=weights,
        max_iter=max_iter,
        # Batch, learning rate and lengths are for this many GPUs and rescaled for others.
        reference_world_size=GPUS,
        amp=dict(enabled=False),
        ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
        checkpointer=dict(period=5000, max_to_keep=100),
        eval_period=0,
        log_period=20,
        precise_bn=dict(enabled=precise_bn, num_iter=200),
        bcn=dict(
            update_rate=DEFAULT_UPDATE_RATE,
            update_rate_schedule="constant",
            first_batch_init=True,
            sync_estimates=True,
        ),
        recompute=[],
        on_resume="checkpoint",
        device="cuda",
        seed=-1,
    )
