from ..common.zoo import build

dataloader, lr_multiplier, model, optimizer, train = build(
    "faster", "X-50", "bcn_ws", schedule="1x", images_per_gpu=2
)
