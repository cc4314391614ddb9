"""Which runs a study consists of, and what makes two of them the same run."""

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from ..checkpoint.files.opening import file_sha256
from ..config import get_cfg
from ..engine import UsageError, load_config

__all__ = ["WEIGHTS", "Run", "default_of", "flatten", "label_configs", "make_plan"]

# Beside the config's keys in a run's settings: content of the file that MODEL.WEIGHTS names, where
# that is a file here.
WEIGHTS = "study.weights_sha256"
# Where a run leaves things and how it is watched, not what it computes.
_IGNORED = {
    "OUTPUT_DIR",
    "VERSION",
    "VIS_PERIOD",
    "DATALOADER.NUM_WORKERS",
    "MODEL.DEVICE",
    "MODEL.BCN.MONITOR_PERIOD",
    "SOLVER.CHECKPOINT_PERIOD",
}
# Kept whatever their value where they have an effect, so that a record stays what it is when one of
# their defaults moves. Other keys of these nodes count where they differ from the default: a run
# is the same run after a key was added.
_RECORDED = {
    "MODEL.BCN.UPDATE_RATE",
    "MODEL.BCN.UPDATE_RATE_SCHEDULE",
    "MODEL.BCN.FIRST_BATCH_INIT",
    "MODEL.BCN.SYNC_ESTIMATES",
    "MODEL.WS.EPS",
    "MODEL.WS.FORMULA",
    "MODEL.WS.KIND",
}
_SCALED = ("IMS_PER_BATCH", "BASE_LR", "MAX_ITER", "STEPS", "WARMUP_ITERS", "CHECKPOINT_PERIOD")


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        variant: label in tables and plots.
        config_file: YAML file.
        overrides: ``KEY VALUE`` pairs that make the config file into this run's config.
        settings: the effective config where it differs from the defaults, with the options of WS
            and BCN where they have an effect. Two runs with equal settings are the same.
    """

    variant: str
    config_file: str
    overrides: tuple[str, ...]
    settings: dict = field(hash=False)

    @property
    def seed(self) -> int:
        return self.settings["SEED"]

    @property
    def images_per_step(self) -> int:
        return self.settings.get("SOLVER.IMS_PER_BATCH", default_of("SOLVER.IMS_PER_BATCH"))

    @property
    def max_iter(self) -> int:
        return self.settings.get("SOLVER.MAX_ITER", default_of("SOLVER.MAX_ITER"))

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:10]

    @property
    def name(self) -> str:
        """Of the run's folder and record."""
        label = "".join(c if c.isalnum() or c in "._=-" else "-" for c in self.variant)
        return f"{label}_{self.images_per_step}img_seed{self.seed}_{self.digest}"


def flatten(cfg: CfgNode, prefix: str = "") -> dict:
    """A config as one flat dict; tuples become lists, as in JSON."""
    flat = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = json.loads(json.dumps(value, default=str))
    return flat


_defaults = flatten(get_cfg())


def default_of(key: str) -> object:
    """Default value of a key, None for one that does not exist."""
    return _defaults.get(key)


def _settings(cfg: CfgNode) -> dict:
    flat = flatten(cfg)
    norms = {str(value) for key, value in flat.items() if key.endswith(".NORM")}
    names = {str(value) for key, value in flat.items() if key.endswith(".NAME")}
    with_effect = {
        "MODEL.BCN.": any(norm.endswith(("BCN", "EstBN")) for norm in norms),
        "MODEL.WS.": any(name.startswith(("build_ws_", "WS")) for name in names)
        or bool(flat.get("MODEL.WS.PARTS")),
    }
    idle = tuple(node for node, used in with_effect.items() if not used)
    result = {
        key: value
        for key, value in flat.items()
        if key not in _IGNORED
        and not key.startswith(idle)
        and (key in _RECORDED or value != default_of(key))
    }
    result["SEED"] = cfg.SEED
    return result


def label_configs(paths: Sequence[str]) -> dict[str, str]:
    """Config files by short labels: their stems without the part that all begin with."""
    stems = [Path(path).stem for path in paths]
    common = os.path.commonprefix(stems) if len(stems) > 1 else ""
    common = common[: common.rfind("_") + 1]
    labels = [stem[len(common) :] or stem for stem in stems]
    if len(set(labels)) < len(labels):
        raise UsageError("two of the configs have the same name: rename one")
    return dict(zip(labels, map(str, paths), strict=True))


def _schedule(cfg: CfgNode, max_iter: int | None, evaluations: int, images: int) -> CfgNode:
    """The config with its schedule resized, then rescaled to a number of images per step.

    Detectron2's linear rule: twice the images per step is twice the learning rate and half the
    iterations, warm-up and steps, so that every run sees the same number of images.
    """
    cfg = DefaultTrainer.auto_scale_workers(cfg, 1)  # no-op unless made for several processes
    solver = cfg.SOLVER
    if max_iter:
        factor = max_iter / solver.MAX_ITER
        solver.STEPS = tuple(round(step * factor) for step in solver.STEPS)
        solver.WARMUP_ITERS = round(solver.WARMUP_ITERS * factor)
        solver.MAX_ITER = max_iter
    solver.REFERENCE_WORLD_SIZE = solver.IMS_PER_BATCH
    cfg = DefaultTrainer.auto_scale_workers(cfg, images)
    solver = cfg.SOLVER
    solver.REFERENCE_WORLD_SIZE = 0
    # Rounding of a short schedule may put a step where there is none.
    solver.STEPS = tuple(sorted({step for step in solver.STEPS if 0 < step < solver.MAX_ITER}))
    cfg.TEST.EVAL_PERIOD = -(-solver.MAX_ITER // evaluations)
    solver.CHECKPOINT_PERIOD = cfg.TEST.EVAL_PERIOD
    return cfg


@functools.cache
def _sha256(path: str, modified_ns: int) -> str:  # once per file, not once per run
    return file_sha256(path)


def _make_run(label, path, opts, images, seed, schedule) -> Run:
    cfg = load_config(path, opts)
    cfg.defrost()
    cfg = _schedule(cfg, images=images or cfg.SOLVER.IMS_PER_BATCH, **schedule)
    cfg.SEED = seed
    scaled = [(f"SOLVER.{key}", cfg.SOLVER[key]) for key in _SCALED]
    scaled += [("SOLVER.REFERENCE_WORLD_SIZE", 0), ("TEST.EVAL_PERIOD", cfg.TEST.EVAL_PERIOD)]
    scaled.append(("SEED", seed))
    settings = _settings(cfg)
    if os.path.isfile(cfg.MODEL.WEIGHTS):
        weights = cfg.MODEL.WEIGHTS
        settings[WEIGHTS] = _sha256(weights, os.stat(weights).st_mtime_ns)
    overrides = [*opts, *(str(part) for pair in scaled for part in pair)]
    return Run(label, str(path), tuple(overrides), settings)


def make_plan(
    configs: dict[str, str],
    *,
    images_per_step: Sequence[int] = (),
    seeds: Sequence[int] = (1,),
    sweeps: Iterable[tuple[str, Sequence[str]]] = (),
    max_iter: int | None = None,
    evaluations: int = 5,
    opts: Sequence[str] = (),
) -> list[Run]:
    """All runs of a study, in the order to run them: the first seed of everything comes first.

    Args:
        configs: label to config file.
        images_per_step: numbers of images; a config's own if empty. Learning rate and schedule
            follow by the linear rule.
        seeds: values of ``SEED``.
        sweeps: (key, values) pairs; every combination of values makes a variant. Keys joined by
            commas have the same value.
        max_iter: iterations at the config's own images per step; the whole schedule shrinks or
            grows with it.
        evaluations: points of the AP curves, the last at the end.
        opts: ``KEY VALUE`` overrides of every config.

    Returns:
        list[Run]: without duplicates (a sweep over a key that a config does not use).

    Raises:
        UsageError: for a config or option that cannot be read.
    """
    if evaluations < 1 or (max_iter is not None and max_iter < 1):
        raise UsageError("--max-iter and --evaluations must be at least 1")
    if any(images < 1 for images in images_per_step) or min(seeds) < 0:
        raise UsageError("--images-per-step must be at least 1, --seeds at least 0")
    schedule = {"max_iter": max_iter, "evaluations": evaluations}
    sweeps = list(sweeps)
    runs: dict[str, Run] = {}
    for seed, images in itertools.product(seeds, images_per_step or (None,)):
        for label, path in configs.items():
            for values in itertools.product(*(values for _, values in sweeps)):
                swept = [(keys, value) for (keys, _), value in zip(sweeps, values, strict=True)]
                name = " ".join([label, *(f"{k.split('.')[-1]}={v}" for k, v in swept)])
                pairs = [(key, value) for keys, value in swept for key in keys.split(",")]
                options = [*opts, *(part for pair in pairs for part in pair)]
                run = _make_run(name, path, options, images, seed, schedule)
                runs.setdefault(run.digest, run)
    return list(runs.values())
