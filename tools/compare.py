#!/usr/bin/env python
"""Compare detectors over seeds: run them, then report AP with intervals, curves, cost, pictures.

    tools/compare.py --variants bn gn gn_ws bcn bcn_ws --images-per-step 1 2 --seeds 1 2 3 \\
        --jobs 2 --output output/study
    tools/compare.py --configs A.yaml B.yaml --seeds 1 2 3 --output DIR KEY VALUE ...

Started again, it goes on: finished runs are not repeated, interrupted ones continue at their last
checkpoint. What decides whether a run is finished is a small file in DIR/records: commit or copy
that folder (or name it with --records) and the study continues on another machine. Two studies
may work in one DIR: neither touches a run that the other is at.

Numbers of images per step follow Detectron2's linear rule: twice the images is twice the learning
rate and half the iterations, so every run sees the same images. --max-iter resizes the whole
schedule; overrides (KEY VALUE ...) and --max-iter are meant for the config's own images per step.

Options may stand in a file, named as @FILE. The studies of this project do, beside their results
(configs/*/results): the command that made NAME.csv there is

    tools/compare.py @configs/shapes/results/NAME.args

It reports at once from the committed records (of two of one run, that of the first folder named);
without its line --records it trains. tools/results/update.py does so for all, tables and pages.
glibc's thresholds save page faults, a sixth of each step on a CPU:

    export MALLOC_MMAP_THRESHOLD_=2147483648 MALLOC_TRIM_THRESHOLD_=8589934592

finetune.args needs two classifiers that are trained first (a record knows weights by their content:
where these are others than those of the record, the run is done anew):

    tools/train_net.py --config-file configs/shapes/classifier_R_18_gn_ws.yaml
    tools/train_net.py --config-file configs/shapes/classifier_R_18_bcn_ws.yaml

The same on COCO, on a GPU (leave --max-iter away for the paper's schedule):

    coco=configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_2x
    tools/compare.py --configs ${coco}_{gn,gn_ws,bcn_ws}_1img.yaml \\
        --images-per-step 1 2 --seeds 1 2 3 --max-iter 90000 --output output/coco
"""

import argparse
import importlib
import os
import shlex
import sys
from pathlib import Path

from wsbcn_d2.config import UsageError, load_config, refusing
from wsbcn_d2.engine import check_config
from wsbcn_d2.engine.processes import one_line_errors
from wsbcn_d2.study import find_records, make_plan, matching, run_all, write_report
from wsbcn_d2.study.plan import label_configs
from wsbcn_d2.study.runner import child_command, repeat_command

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = ROOT / "configs" / "shapes"
PREFIX = "mask_rcnn_R_18_FPN_"
ORDER = ("bn", "gn", "gn_ws", "bcn", "bcn_ws")


class _Parser(argparse.ArgumentParser):
    """Reads @FILE as a shell would: several words a line, quotes, comments."""

    def convert_arg_line_to_args(self, arg_line):
        return shlex.split(arg_line, comments=True)


def parse(argv):
    """The command line, as an argparse.Namespace."""
    parser = _Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--configs", nargs="+", metavar="FILE", help="one config per variant")
    what.add_argument(
        "--variants",
        nargs="+",
        default=list(ORDER),
        help=f"names in --folder: {', '.join(ORDER)} if none are given",
    )
    parser.add_argument("--folder", default=str(VARIANTS), help="configs/shapes, configs/nuclei")
    parser.add_argument("--images-per-step", nargs="+", type=int, default=[], metavar="N")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--dataset-train", metavar="NAME", help="in place of the configs'")
    parser.add_argument("--dataset-test", metavar="NAME")
    parser.add_argument("--max-iter", type=int, help="resizes the configs' schedules")
    parser.add_argument("--evaluations", type=int, default=5, help="points of the AP curves")
    parser.add_argument(
        "--sweep",
        nargs="+",
        action="append",
        default=[],
        metavar="KEY VALUE",
        help="KEY[,KEY...] VALUE VALUE ...: a variant per value; again for another key: every "
        "combination",
    )
    parser.add_argument(
        "--monitor-period", type=int, default=100, help="iterations; 0: no channel monitor"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--records", nargs="+", default=[], help="more folders of records")
    parser.add_argument("--pictures", type=int, default=4, help="validation images to draw")
    parser.add_argument("--strip", default="", metavar="PICTURE.png", help="for plots/showcase.png")
    parser.add_argument("--keep-checkpoints", action="store_true")
    parser.add_argument("--report-only", action="store_true", help="of what has finished so far")
    parser.add_argument("--title", default="Comparison over seeds")
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="module that registers datasets or components",
    )
    parser.add_argument("--train-script", default=str(ROOT / "tools" / "train_net.py"))
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides of all configs")
    return parser.parse_args(argv)


def plan(args):
    """The runs that the command line asks for."""
    if args.configs:
        configs = label_configs(args.configs)
    else:
        folder = Path(args.folder)
        configs = {name: relative(folder / f"{PREFIX}{name}.yaml") for name in args.variants}
    opts = list(args.opts)
    for key, name in (("TRAIN", args.dataset_train), ("TEST", args.dataset_test)):
        if name:
            opts += [f"DATASETS.{key}", repr((name,))]
    opts += ["MODEL.BCN.MONITOR_PERIOD", str(args.monitor_period)]
    for sweep in args.sweep:
        if len(sweep) < 2:
            raise UsageError(f"--sweep {sweep[0]}: give at least one value")
    if args.jobs < 1:
        raise UsageError("--jobs must be at least 1")
    return make_plan(
        configs,
        images_per_step=args.images_per_step,
        seeds=args.seeds,
        sweeps=[(sweep[0], sweep[1:]) for sweep in args.sweep],
        max_iter=args.max_iter,
        evaluations=args.evaluations,
        opts=opts,
    )


def relative(path):
    """A path below the working directory as a relative one: it goes into records."""
    path = Path(path).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def check(runs):
    """Refuse what cannot run before anything is started; one seed stands for all."""
    for run in {(run.variant, run.images_per_step): run for run in runs}.values():
        check_config(load_config(run.config_file, run.overrides))


def recorded_runs(args):
    """What --records has of the runs that are asked for, and the names of those that it lacks."""
    return _with_records(plan(args), find_records(*args.records))


def _with_records(runs, records):
    found = [(run, matching(run, records)) for run in runs]
    # One name in one report, whatever the run was called when it was recorded.
    finished = [{**record, "variant": run.variant} for run, record in found if record]
    return finished, [run.name for run, record in found if record is None]


def study(args, command):
    """Run what has no record, and report; returns the exit status."""
    runs = plan(args)
    root = Path(args.output)
    records = find_records(root / "records", *args.records)
    pending = [run for run in runs if matching(run, records) is None]
    print(f"{len(runs)} runs, {len(runs) - len(pending)} of them finished already", flush=True)
    failures = []
    if pending and not args.report_only:
        check(pending)
        script = relative(args.train_script)
        failures = run_all(
            pending,
            root,
            lambda run, folder: child_command(
                run, folder, script=script, modules=args.modules, pictures=args.pictures
            ),
            jobs=args.jobs,
            repeat_of=lambda run: repeat_command(run, script),
            keep_checkpoints=args.keep_checkpoints,
            on_record=records.append,
        )
    finished, without = _with_records(runs, records)
    reasons = {failure.run.name: failure.reason for failure in failures}
    missing = [f"{name}: {reasons.get(name, 'not run yet')}" for name in without]
    if not finished:
        raise UsageError(f"no run has finished; see the output.txt of each run in {root / 'runs'}")
    with refusing("--strip: ", ValueError):
        path = write_report(
            finished, root, title=args.title, command=command, missing=missing, strip=args.strip
        )
    print("\n" + (root / "results.md").read_text())
    print(f"report  {path}\ntables  {root / 'results.csv'}, {root / 'runs.csv'}")
    return 1 if failures else 0


@one_line_errors
def main(argv=None) -> int:
    """Runs the tool; returns the exit status: 0, 1 (some runs failed), 2 (wrong input)."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    sys.path.insert(0, os.getcwd())
    try:
        with refusing("", ImportError):
            for name in args.modules:
                importlib.import_module(name)
        return study(args, "python tools/compare.py " + shlex.join(argv))
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
