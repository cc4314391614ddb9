"""Whole models of tools/benchmark.py: training steps, inference, watched channels."""

import copy
from pathlib import Path
from types import SimpleNamespace

import torch
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from wsbcn_d2 import fold
from wsbcn_d2.engine import ChannelMonitor, load_config
from wsbcn_d2.layers import BatchChannelNorm2d, WSConv2d
from wsbcn_d2.modeling.recomputation import recompute

from .runner import Run, Runner, halfway, milliseconds, ratio, shown

PERIOD, WINDOW = 100, 8  # of the monitor: tools/compare.py's period, the hook's own window


def random_batch(images: int, height: int, width: int, classes: int, train: bool) -> list[dict]:
    """Images of noise; in training with seven boxes and masks each, as COCO has."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(images):
        image = torch.randint(0, 256, (3, height, width), generator=generator).to(torch.uint8)
        item = {"image": image, "height": height, "width": width}
        if train:
            corner = torch.rand(7, 2, generator=generator) * 0.6
            extent = torch.rand(7, 2, generator=generator) * 0.3 + 0.1
            scale = torch.tensor([width, height])
            boxes = torch.cat([corner * scale, (corner + extent) * scale], dim=1)
            masks = torch.zeros(7, height, width, dtype=torch.bool)
            for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
                mask[y0:y1, x0:x1] = True
            truth = Instances((height, width), gt_boxes=Boxes(boxes), gt_masks=BitMasks(masks))
            truth.gt_classes = torch.randint(0, classes, (7,), generator=generator)
            item["instances"] = truth
        batch.append(item)
    return batch


def load(path: str, device: str):
    """A config, made fit for batches of noise, and its model."""
    cfg = load_config(
        path,
        [
            *("MODEL.DEVICE", device, "MODEL.WEIGHTS", "", "INPUT.MASK_FORMAT", "bitmask"),
            # As many detections from every untrained model, so that all do the same work.
            *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
        ],
    )
    return cfg, build_model(cfg)


def training(cfg, model, args, images: int):
    """A callable that does one training step."""
    batch = random_batch(images, *args.image_size, cfg.MODEL.ROI_HEADS.NUM_CLASSES, train=True)
    # The work is real, the learning is not: noise at the config's rate would diverge.
    optimizer = build_optimizer(cfg, model)
    for group in optimizer.param_groups:
        group["lr"] = 1e-8

    def step():
        torch.manual_seed(0)  # the same boxes for every variant
        with EventStorage():
            losses = sum(model(batch).values())
        halfway()
        losses.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # else what a step frees would hide what it takes

    return step


def _inference(model, args, images: int):
    batch = random_batch(images, *args.image_size, 1, train=False)

    def infer():
        with torch.no_grad():
            model(batch)

    return infer


def step_mode(runner: Runner, args) -> dict:
    """Training step and inference; the ratios are to the first config."""
    loaded = {Path(path).stem: load(path, args.device) for path in args.configs}
    if args.channels_last:
        for _, model in loaded.values():
            model.to(memory_format=torch.channels_last)
    variants = dict(loaded)
    for name, (cfg, model) in loaded.items():
        for patterns in args.recompute:
            twin = recompute(copy.deepcopy(model), patterns)
            variants[f"{name}, recomputed {' '.join(patterns)}"] = cfg, twin
    rows = []
    for images in args.images:
        runs = {
            name: training(cfg, model.train(), args, images)
            for name, (cfg, model) in variants.items()
        }
        # Optimizer state exists after the first step and is not the step's own.
        rows += _report(runner, "train", images, runs, runner.rounds(runs))
        models = {name: model.eval() for name, (_, model) in loaded.items()}
        for name, model in dict(models).items():
            if any(isinstance(m, (WSConv2d, BatchChannelNorm2d)) for m in model.modules()):
                models[f"{name} folded"] = fold(model)
        if not args.recompute:  # which changes nothing here
            runs = {name: _inference(model, args, images) for name, model in models.items()}
            rows += _report(runner, "infer", images, runs, runner.rounds(runs))
    return {"mode": "step", "rows": rows}


def _report(runner: Runner, what: str, images: int, runs: dict, times: dict) -> list[dict]:
    rows = []
    base = next(iter(times))
    for name, run in runs.items():
        memory = runner.memory(run)
        row = {
            "what": what,
            "images": images,
            "name": name,
            "ms": milliseconds(times[name]),
            "time": ratio(times[name], times[base]),
            **{f"{key} bytes": value for key, value in memory.items()},
        }
        first = rows[0] if rows else row
        row["peak"] = row["peak bytes"] / first["peak bytes"]
        row["kept"] = row["kept bytes"] / first["kept bytes"] if first["kept bytes"] > 0 else 0.0
        rows.append(row)
        sizes = ", ".join(f"{key} {value / 2**20:.0f} MiB" for key, value in memory.items())
        print(
            f"{what:6} {images} image(s)  time {shown(row['time'])}  peak {row['peak']:.3f}  "
            f"kept {row['kept']:.3f}  ({row['ms']:.0f} ms, {sizes})  {name}",
            flush=True,
        )
    return rows


def monitor_mode(runner: Runner, args) -> dict:
    """A window of watched steps against as many that are not watched, per config."""
    rows = []
    for path in args.configs:
        cfg, model = load(path, args.device)
        for images in args.images:
            step = training(cfg, model.train(), args, images)
            # Periods as short as a window: every step is watched, the last one sums up.
            hooks = {"watched": ChannelMonitor(WINDOW, WINDOW), "plain": HookBase()}
            for hook in hooks.values():
                hook.trainer = SimpleNamespace(model=model, storage=EventStorage(), iter=0)
                hook.before_train()
            times = runner.rounds({name: _window(step, hook) for name, hook in hooks.items()})
            time = ratio(times["watched"], times["plain"])
            ms = milliseconds(times["plain"]) / WINDOW
            share = (time["ratio"] - 1) * WINDOW / PERIOD
            rows.append({"config": path, "images": images, "ms": ms, "time": time, "share": share})
            print(
                f"{images} image(s)  watched / plain step {shown(time)}  {100 * share:.2f} % of a "
                f"training watched every {PERIOD} steps  ({ms:.0f} ms a step)  {path}",
                flush=True,
            )
    return {"mode": "monitor", "rows": rows}


def _window(step: Run, hook: HookBase) -> Run:
    def run():
        for i in range(WINDOW):
            hook.trainer.iter = i
            hook.before_step()
            step()
            hook.after_step()

    return run
