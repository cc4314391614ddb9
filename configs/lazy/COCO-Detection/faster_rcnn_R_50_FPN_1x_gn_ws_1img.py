from ..common.zoo import build

dataloader, lr_multiplier, model, optimizer, train = build(
    "faster", "R-50", "gn_ws", schedule="1x", images_per_gpu=1
)
