from ..common.zoo import build

dataloader, lr_multiplier, model, optimizer, train = build(
    "mask", "R-50", "bcn_ws_scratch", schedule="3x", images_per_gpu=2
)
