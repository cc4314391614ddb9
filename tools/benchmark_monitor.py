"""Monitor mode of tools/benchmark.py: what watching the channels costs a training."""

import statistics
from types import SimpleNamespace

from benchmark import Runner, ratio
from benchmark_step import load, training
from detectron2.utils.events import EventStorage

from wsbcn_d2.engine import ChannelMonitor

PERIOD, WINDOW = 100, 8  # tools/compare.py's period, the hook's own window


def monitor_mode(runner: Runner, args) -> dict:
    """A window of watched steps against as many that are not watched, per config."""
    rows = []
    for path in args.configs:
        cfg, model = load(path, args.device)
        for images in args.images:
            step = training(cfg, model.train(), args, images)
            trainer = SimpleNamespace(model=model, storage=EventStorage(), iter=0)
            # Periods as short as a window: every step is watched, the last one sums up.
            monitor = ChannelMonitor(WINDOW, WINDOW)
            monitor.trainer = trainer
            monitor.before_train()
            times = runner.rounds({"watched": _window(step, monitor), "plain": _window(step)})
            row = {
                "config": path,
                "images": images,
                "ms": statistics.median(times["plain"]) / WINDOW,
            }
            row["time"] = ratio(times["watched"], times["plain"])
            row["share"] = (row["time"]["ratio"] - 1) * WINDOW / PERIOD
            rows.append(row)
            print(
                f"{images} image(s)  watched / plain step {row['time']['ratio']:.3f}"
                f"+-{row['time']['spread']:.3f}  {100 * row['share']:.2f} % of a training watched "
                f"every {PERIOD} steps  ({row['ms']:.0f} ms a step)  {path}",
                flush=True,
            )
    return {"mode": "monitor", "rows": rows}


def _window(step, monitor=None):
    def run():
        for i in range(WINDOW):
            if monitor is None:
                step()
                continue
            monitor.trainer.iter = i
            monitor.before_step()
            step()
            monitor.after_step()

    return run
