from ..common.zoo import build

dataloader, lr_multiplier, model, optimizer, train = build(
    "cascade_mask", "R-50", "bcn_ws", schedule="2x", images_per_gpu=1
)
