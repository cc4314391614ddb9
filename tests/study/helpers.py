"""Records as a study would leave them, without one; the study's tool."""

import importlib.util
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "compare.py"


def load_tool():
    """``tools/compare.py`` as a module."""
    spec = importlib.util.spec_from_file_location("compare", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_record(variant="gn", images=1, seed=1, *, box=10.0, settings=None, **more):
    """A record with two evaluations, of box AP 0 and ``box``, mask AP one below."""
    settings = {**(settings or {}), "SEED": seed, "SOLVER.IMS_PER_BATCH": images}
    return {
        "format": 1,
        "variant": variant,
        "config_file": f"{variant}.yaml",
        "digest": f"{variant}{images}{seed}",
        "settings": settings,
        "seed": seed,
        "images_per_step": images,
        "learning_rate": 0.01 * images,
        "max_iter": 100 // images,
        "ap": {
            task: [[50 // images, 10.0, 0.0], [100 // images, 20.0, value]]
            for task, value in (("bbox", box), ("segm", box - 1))
        },
        "final_ap": {"bbox": box, "segm": box - 1},
        "loss": [[19, 3.0], [39, 2.0]],
        "channels": {
            f"channels/{part}/{quantity}_mean": [[49, 0.1], [99, 0.2]]
            for part in ("backbone", "fpn")
            for quantity in ("inactive", "shift")
        },
        "step_seconds": 0.4,
        "train_seconds": 20.0,
        "wall_seconds": 30.0,
        "memory_mb": 900,
        "memory_kind": "RSS",
        "hardware": "a processor, 2 cores",
        "threads": 1,
        "versions": {"python": "3.11", "torch": "2.12", "detectron2": "0.6"},
        "git": "abc",
        "command": "python tools/train_net.py",
        "finished": "2026-01-01",
        **more,
    }
