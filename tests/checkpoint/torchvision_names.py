"""Names and shapes of ResNets as torchvision spells them, for crafted checkpoints."""


def basic_resnet(blocks=(2, 2, 2, 2)):
    """Name to shape of a ResNet of basic blocks with group norms, without a classifier."""
    shapes = {"conv1.weight": (64, 3, 7, 7), "bn1.weight": (64,), "bn1.bias": (64,)}
    channels = 64
    for stage, count in enumerate(blocks):
        out = 64 * 2**stage
        for block in range(count):
            name = f"layer{stage + 1}.{block}."
            for number, inputs in ((1, channels), (2, out)):
                shapes[f"{name}conv{number}.weight"] = (out, inputs, 3, 3)
                shapes[f"{name}bn{number}.weight"] = shapes[f"{name}bn{number}.bias"] = (out,)
            if channels != out:
                shapes[f"{name}downsample.0.weight"] = (out, channels, 1, 1)
                shapes[f"{name}downsample.1.weight"] = shapes[f"{name}downsample.1.bias"] = (out,)
            channels = out
    return shapes
