from ..common.zoo import build

dataloader, lr_multiplier, model, optimizer, train = build(
    "mask", "R-50", "gn_ws", schedule="2x", images_per_gpu=1
)
