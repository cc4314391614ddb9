"""A Python config for a data set of one's own: an experiment by its name, and what differs.

    tools/lazyconfig_train_net.py --config-file configs/lazy/own.py train.output_dir=output/mine

Everything is explained in ``configs/own/mask_rcnn_R_50_FPN_gn_ws_1img.yaml``.
"""

from .common.zoo import by_name

dataloader, lr_multiplier, model, optimizer, train = by_name("mask_rcnn_R_50_FPN_2x_gn_ws_1img")

dataloader["coco_sets"] = [
    {"NAME": "my_train", "JSON": "data/train.json", "IMAGES": "data/train"},
    {"NAME": "my_val", "JSON": "data/val.json", "IMAGES": "data/val"},
]
dataloader["train"]["dataset"]["names"] = "my_train"
dataloader["train"]["mapper"]["instance_mask_format"] = "bitmask"
dataloader["train"]["total_batch_size"] = 1
dataloader["test"]["dataset"]["names"] = "my_val"
model["roi_heads"]["num_classes"] = 1

# 50 passes over 500 pictures, one a step; the rate drops at 70 and at 90 %.
train.update(reference_world_size=0, max_iter=25000, eval_period=2500)
train["checkpointer"]["period"] = 2500
optimizer["lr"] = 0.00125
lr_multiplier["scheduler"]["milestones"] = [17500, 22500]
