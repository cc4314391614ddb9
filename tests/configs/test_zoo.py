"""Every COCO config, YAML and Python, against one table of what its name promises."""

import copy
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import DefaultTrainer
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from torch import nn

from wsbcn_d2 import BatchChannelNorm2d, EstimatedBatchNorm2d, WSConv2d, get_cfg
from wsbcn_d2.checkpoint.catalog.entries import CATALOG
from wsbcn_d2.engine import lazy

# Of each name there is one file for 1 and one for 2 images per GPU. Convolutions with a norm, as
# backbone/FPN/box head/mask head; those of WS variants (with a formula) are all standardized.
TABLE = """
name                                         epochs         norm      formula       pixels convs
mask_rcnn_R_50_FPN_2x_gn                     20.5/23.2/24.6 GN        -             BGR    53/8/4/4
mask_rcnn_R_50_FPN_2x_gn_ws                  20.5/23.2/24.6 GN        unbiased_std  RGB    53/8/4/4
mask_rcnn_R_50_FPN_2x_bcn_ws                 20.5/23.2/24.6 BCN       unbiased      RGB    53/8/4/4
mask_rcnn_R_50_FPN_2x_bcn                    20.5/23.2/24.6 BCN       -             RGB    53/8/4/4
mask_rcnn_R_50_FPN_2x_bn_ws                  20.5/23.2/24.6 BN        unbiased      RGB    53/8/4/4
mask_rcnn_R_50_FPN_2x_syncbn                 20.5/23.2/24.6 SyncBN    -             BGR    53/8/4/4
mask_rcnn_R_50_FPN_2x_frozenbn               20.5/23.2/24.6 FrozenBN  -             BGR    53/0/0/0
mask_rcnn_R_50_FPN_3x_bcn_ws_scratch         28.7/34.1/36.8 BCN       unbiased      RGB    53/8/4/4
mask_rcnn_R_101_FPN_2x_gn                    20.5/23.2/24.6 GN        -             BGR    104/8/4/4
mask_rcnn_R_101_FPN_2x_gn_ws                 20.5/23.2/24.6 GN        unbiased_std  RGB    104/8/4/4
mask_rcnn_R_101_FPN_2x_bcn_ws                20.5/23.2/24.6 BCN       unbiased      RGB    104/8/4/4
mask_rcnn_X_50_32x4d_FPN_2x_gn               20.5/23.2/24.6 GN        -             RGB    53/8/4/4
mask_rcnn_X_50_32x4d_FPN_2x_gn_ws            20.5/23.2/24.6 GN        unbiased_std  RGB    53/8/4/4
mask_rcnn_X_50_32x4d_FPN_2x_bcn_ws           20.5/23.2/24.6 BCN       unbiased      RGB    53/8/4/4
mask_rcnn_X_101_32x4d_FPN_2x_gn              20.5/23.2/24.6 GN        -             RGB    104/8/4/4
mask_rcnn_X_101_32x4d_FPN_2x_gn_ws           20.5/23.2/24.6 GN        unbiased_std  RGB    104/8/4/4
mask_rcnn_X_101_32x4d_FPN_2x_bcn_ws          20.5/23.2/24.6 BCN       unbiased      RGB    104/8/4/4
cascade_mask_rcnn_R_50_FPN_2x_bcn_ws         20.5/23.2/24.6 BCN       unbiased      RGB    53/8/12/4
faster_rcnn_R_50_FPN_1x_gn                   8.2/10.9/12.3  GN        -             BGR    53/8/4/0
faster_rcnn_R_50_FPN_1x_gn_ws                8.2/10.9/12.3  GN        unbiased_std  RGB    53/8/4/0
faster_rcnn_R_50_FPN_1x_bcn_ws               8.2/10.9/12.3  BCN       unbiased      RGB    53/8/4/0
faster_rcnn_R_101_FPN_1x_gn                  8.2/10.9/12.3  GN        -             BGR    104/8/4/0
faster_rcnn_R_101_FPN_1x_gn_ws               8.2/10.9/12.3  GN        unbiased_std  RGB    104/8/4/0
faster_rcnn_R_101_FPN_1x_bcn_ws              8.2/10.9/12.3  BCN       unbiased      RGB    104/8/4/0
faster_rcnn_X_50_32x4d_FPN_1x_gn             8.2/10.9/12.3  GN        -             RGB    53/8/4/0
faster_rcnn_X_50_32x4d_FPN_1x_gn_ws          8.2/10.9/12.3  GN        unbiased_std  RGB    53/8/4/0
faster_rcnn_X_50_32x4d_FPN_1x_bcn_ws         8.2/10.9/12.3  BCN       unbiased      RGB    53/8/4/0
faster_rcnn_X_101_32x4d_FPN_1x_gn            8.2/10.9/12.3  GN        -             RGB    104/8/4/0
faster_rcnn_X_101_32x4d_FPN_1x_gn_ws         8.2/10.9/12.3  GN        unbiased_std  RGB    104/8/4/0
faster_rcnn_X_101_32x4d_FPN_1x_bcn_ws        8.2/10.9/12.3  BCN       unbiased      RGB    104/8/4/0
retinanet_R_50_FPN_1x_gn_ws                  8.2/10.9/12.3  GN        unbiased_std  RGB    53/6/8/0
"""
ROWS = {row.split()[0]: row.split()[1:] for row in TABLE.strip().splitlines()[1:]}
NAMES = [f"{name}_{images}img" for name in ROWS for images in (1, 2)]
COCO_IMAGES = 117266  # of train2017, with annotations
BATCH_AND_LR = {1: (4, 0.005), 2: (8, 0.01)}
ITERATIONS = {  # at 2 images per GPU
    "1x": (120000, 160000, 180000),
    "2x": (300000, 340000, 360000),
    "3x": (420000, 500000, 540000),
}
PIXELS = {
    "RGB": ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
    "BGR": ([103.53, 116.28, 123.675], [1.0, 1.0, 1.0]),
}
CLASSES = {
    "GN": nn.GroupNorm,
    "BCN": BatchChannelNorm2d,
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "FrozenBN": FrozenBatchNorm2d,
}
PARTS = (
    "backbone.bottom_up.",
    "backbone.fpn_",
    ("roi_heads.box_head.", "head.cls_subnet.", "head.bbox_subnet."),
    "roi_heads.mask_head.",
)


def yaml_path(name):
    folder = "COCO-InstanceSegmentation" if "mask" in name else "COCO-Detection"
    return ROOT / "configs" / folder / f"{name}.yaml"


def lazy_path(name):
    path = yaml_path(name)
    return path.parents[1] / "lazy" / path.parent.name / f"{name}.py"


def load_yaml(name):
    cfg = get_cfg()
    cfg.merge_from_file(str(yaml_path(name)))
    cfg.MODEL.DEVICE = "meta"
    return cfg


def build(name):
    """The models of both files, on the meta device, and both configs."""
    cfg, lazy_cfg = load_yaml(name), LazyConfig.load(str(lazy_path(name)))
    with torch.device("meta"):
        return cfg, build_model(cfg), lazy_cfg, instantiate(lazy_cfg.model)


def test_the_table_lists_the_files():
    configs = ROOT / "configs"
    assert {p.stem for p in configs.glob("COCO-*/*.yaml")} == set(NAMES)
    assert {p.stem for p in configs.glob("lazy/COCO-*/*.py")} == set(NAMES)
    assert all(yaml_path(name).is_file() and lazy_path(name).is_file() for name in NAMES)


@pytest.mark.parametrize("name", NAMES[::9])
def test_a_name_is_enough(name, tmp_path):
    """Where there are no symbolic links, as in a wheel, every file is a copy of the one."""
    shutil.copytree(ROOT / "configs" / "lazy", tmp_path / "lazy", symlinks=False)
    copied = tmp_path / "lazy" / lazy_path(name).parent.name / lazy_path(name).name
    assert copied.is_file() and not copied.is_symlink()
    assert str(LazyConfig.load(str(copied))) == str(LazyConfig.load(str(lazy_path(name))))


def test_detectron2s_own_loading_needs_nothing_imported(monkeypatch):
    code = f"""
from detectron2.config import LazyConfig
cfg = LazyConfig.load("configs/lazy/COCO-InstanceSegmentation/{NAMES[0]}.py")
assert cfg.dataloader.train.total_batch_size == 4
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True)


def test_a_name_that_describes_nothing(tmp_path):
    shutil.copytree(ROOT / "configs" / "lazy", tmp_path / "lazy", symlinks=False)
    for name in ("mask_rcnn_R_50_FPN_2x_bnc_ws_1img", "mask_rcnn_R_51_FPN_2x_gn_1img", "x_1img"):
        path = tmp_path / "lazy" / "COCO-Detection" / f"{name}.py"
        shutil.copy(ROOT / "configs" / "lazy" / "by_name.py", path)
        with pytest.raises(ValueError, match=f"no experiment '{name}.py'.*bcn_ws_scratch"):
            LazyConfig.load(str(path))


def yaml_protocol(cfg):
    return {
        "batch": cfg.SOLVER.IMS_PER_BATCH,
        "lr": cfg.SOLVER.BASE_LR,
        "iterations": (*cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER),
        "reference": cfg.SOLVER.REFERENCE_WORLD_SIZE,
        "weights": cfg.MODEL.WEIGHTS,
        "format": cfg.INPUT.FORMAT,
        "pixels": (list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD)),
        "sizes": (*cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST),
        "precise": cfg.TEST.PRECISE_BN.ENABLED,
    }


def lazy_protocol(cfg):
    train, test = cfg.dataloader.train, cfg.dataloader.test
    resize = train.mapper.augmentations[0]
    assert test.mapper.image_format == train.mapper.image_format
    return {
        "batch": train.total_batch_size,
        "lr": cfg.optimizer.lr,
        "iterations": (*cfg.lr_multiplier.scheduler.milestones, cfg.train.max_iter),
        "reference": cfg.train.reference_world_size,
        "weights": cfg.train.init_checkpoint,
        "format": train.mapper.image_format,
        "pixels": (list(cfg.model.pixel_mean), list(cfg.model.pixel_std)),
        "sizes": (
            *(resize.short_edge_length, resize.max_size),
            test.mapper.augmentations[0].short_edge_length,
        ),
        "precise": cfg.train.precise_bn.enabled,
    }


def expected_protocol(name, weights):
    base, images = name[: -len("_1img")], int(name[-4])
    epochs, norm, _, pixels, _ = ROWS[base]
    batch, lr = BATCH_AND_LR[images]
    iterations = next(n for schedule, n in ITERATIONS.items() if f"_{schedule}_" in name)
    iterations = tuple(n * 2 // images for n in iterations)
    assert [f"{n * batch / COCO_IMAGES:.1f}" for n in iterations] == epochs.split("/")
    return {
        "batch": batch,
        "lr": pytest.approx(lr / 2 if "retinanet" in name else lr),
        "iterations": iterations,
        "reference": 4,
        "weights": weights,
        "format": pixels,
        "pixels": PIXELS[pixels],
        "sizes": (800, 1333, 800),
        "precise": norm == "SyncBN",
    }


def check_weights_name(weights, name):
    """The weights are those of the backbone and of the variant."""
    backbone = "-".join(name.split("rcnn_")[-1].removeprefix("retinanet_").split("_")[:2])
    _, norm, formula, pixels, _ = ROWS[name[: -len("_1img")]]
    if "scratch" in name:
        assert weights == ""
    elif norm in ("SyncBN", "FrozenBN"):
        assert weights == f"detectron2://ImageNetPretrained/MSRA/{backbone}.pkl"
    else:
        kind = f"{norm}-WS" if formula != "-" else norm
        stem = weights.rsplit("/", 1)[1].replace("-32x4d", "").removesuffix(".pth")
        assert stem == f"{backbone}-{kind}"
        assert weights.startswith(("wsbcn://", "catalog://", "weights/"))
    if weights.startswith("wsbcn://"):
        entry = CATALOG[weights.removeprefix("wsbcn://")]
        assert (entry.norm, entry.formula) == (norm, "none" if formula == "-" else formula)
        assert entry.pixels.input_format == pixels
        assert (list(entry.pixels.pixel_mean), list(entry.pixels.pixel_std)) == PIXELS[pixels]


def check_layers(model, name):
    """WS and norms sit where the variant says, and nowhere else."""
    _, norm, formula, _, convs = ROWS[name[: -len("_1img")]]
    modules = dict(model.named_modules())
    normed = {n: m for n, m in modules.items() if isinstance(m, Conv2d) and m.norm is not None}
    norms = {n: m.norm for n, m in normed.items()}
    if "retinanet" in name:  # the head's norms stand beside its convolutions
        for n, module in modules.items():
            if n.startswith(PARTS[2]) and isinstance(module, nn.GroupNorm):
                before = n.rpartition(".")[0] + f".{int(n.rpartition('.')[2]) - 1}"
                normed[before], norms[before] = modules[before], module
    counts = [sum(n.startswith(part) for n in normed) for part in PARTS]
    assert counts == [int(count) for count in convs.split("/")]
    assert len(normed) == sum(counts)  # none in RPN and predictors
    standardized = {n: m for n, m in modules.items() if isinstance(m, WSConv2d)}
    assert set(standardized) == (set() if formula == "-" else set(normed))
    assert all(m.ws_formula == formula and m.ws_eps == 1e-5 for m in standardized.values())
    for conv, module in norms.items():
        frozen = "scratch" not in name and (".stem." in conv or ".res2." in conv)
        if norm == "BCN":
            inner = FrozenBatchNorm2d if frozen else EstimatedBatchNorm2d
            assert (type(module), type(module.bn)) == (BatchChannelNorm2d, inner), conv
        elif frozen and norm in ("BN", "SyncBN"):
            assert type(module) is FrozenBatchNorm2d, conv
        else:
            assert type(module) is CLASSES[norm], conv
        assert not (frozen and any(p.requires_grad for p in modules[conv].parameters()))
    convolutions = [m for m in modules.values() if isinstance(m, nn.Conv2d)]
    assert (max(m.groups for m in convolutions) == 32) == ("32x4d" in name)
    stride_in_1x1 = modules["backbone.bottom_up.res3.0.conv1"].stride == (2, 2)
    assert stride_in_1x1 == (norm in ("SyncBN", "FrozenBN"))  # of MSRA's weights alone
    if "retinanet" not in name:
        assert ("roi_heads.mask_head" in modules) == ("mask" in name)
        assert model.proposal_generator.post_nms_topk[True] == 2000 // int(name[-4])


@pytest.mark.rotated(4)
@pytest.mark.parametrize("name", NAMES)
def test_config_is_what_its_name_says(name):
    cfg, model, lazy_cfg, lazy_model = build(name)
    check_weights_name(cfg.MODEL.WEIGHTS, name)
    expected = expected_protocol(name, cfg.MODEL.WEIGHTS)
    assert yaml_protocol(cfg) == expected
    assert lazy_protocol(lazy_cfg) == expected
    check_layers(model, name)
    # The same model: modules with their options, parameters and buffers, in the same order.
    assert str(lazy_model).partition("(")[2] == str(model).partition("(")[2]
    shapes = [(n, t.shape, t.requires_grad) for n, t in model.named_parameters()]
    assert [(n, t.shape, t.requires_grad) for n, t in lazy_model.named_parameters()] == shapes
    shapes = {n: t.shape for n, t in model.state_dict().items()}
    assert {n: t.shape for n, t in lazy_model.state_dict().items()} == shapes


WORLD_SIZES = (1, 2, 4, 8, 16)


@pytest.mark.parametrize("name", NAMES)
def test_images_per_gpu_and_epochs_survive_another_number_of_gpus(name):
    cfg = load_yaml(name)
    images = int(name[-4])
    iterations = (*cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER)
    for world_size in WORLD_SIZES:
        solver = DefaultTrainer.auto_scale_workers(cfg, world_size).SOLVER
        assert world_size * images == solver.IMS_PER_BATCH
        assert pytest.approx(cfg.SOLVER.BASE_LR * world_size / 4) == solver.BASE_LR
        scaled = (*solver.STEPS, solver.MAX_ITER)
        assert [n * world_size for n in scaled] == [n * 4 for n in iterations]  # as many images


@pytest.mark.parametrize(
    "name",
    ["mask_rcnn_R_50_FPN_3x_bcn_ws_scratch_1img", "faster_rcnn_R_50_FPN_1x_bcn_ws_2img"],
)
def test_python_configs_scale_like_yaml(name):
    cfg = LazyConfig.load(str(lazy_path(name)))
    stock = copy.deepcopy(cfg)
    for world_size in WORLD_SIZES:
        scaled = lazy.auto_scale(cfg, world_size)
        expected = DefaultTrainer.auto_scale_workers(load_yaml(name), world_size)
        protocol, wanted = lazy_protocol(scaled), yaml_protocol(expected)
        assert protocol.pop("lr") == pytest.approx(wanted.pop("lr"))
        assert protocol == {**wanted, "reference": world_size}
        assert scaled.train.checkpointer.period == expected.SOLVER.CHECKPOINT_PERIOD
        warmup = instantiate(scaled.lr_multiplier)
        share = expected.SOLVER.WARMUP_ITERS / expected.SOLVER.MAX_ITER
        factors = [warmup(share * x) for x in (0, 0.5, 1)]
        assert factors == pytest.approx([1 / 3, 2 / 3, 1], abs=1e-3)
    assert cfg == stock


@pytest.mark.parametrize(
    "name", ["mask_rcnn_R_50_FPN_2x_bcn_ws_1img", "retinanet_R_50_FPN_1x_gn_ws_2img"]
)
def test_optimizer_of_the_release(name):
    cfg, model, lazy_cfg, lazy_model = build(name)
    lazy_cfg.optimizer.params.model = lazy_model
    for module, optimizer in (
        (model, build_optimizer(cfg, model)),
        (lazy_model, instantiate(lazy_cfg.optimizer)),
    ):
        names = {id(p): n for n, p in module.named_parameters() if p.requires_grad}
        lr = cfg.SOLVER.BASE_LR
        seen = set()
        for group in optimizer.param_groups:
            assert group["momentum"] == 0.9
            for parameter in group["params"]:
                bias = names[id(parameter)].endswith("bias")
                seen.add(id(parameter))
                assert group["lr"] == pytest.approx(2 * lr if bias else lr)
                assert group["weight_decay"] == (0.0 if bias else 1e-4)
        assert seen == set(names)


def test_norms_may_be_callables():
    cfg = LazyConfig.load(str(lazy_path("mask_rcnn_R_50_FPN_2x_gn_ws_1img")))

    def few_groups(channels):
        return nn.GroupNorm(4, channels)

    cfg.model.roi_heads.mask_head.conv_norm = few_groups
    with torch.device("meta"):
        model = instantiate(cfg.model)
    assert model.roi_heads.mask_head.mask_fcn1.norm.num_groups == 4
    assert isinstance(model.roi_heads.mask_head.mask_fcn1, WSConv2d)
