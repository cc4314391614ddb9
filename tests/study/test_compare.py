"""``tools/compare.py`` from the command line to the report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY
from wsbcn_d2.engine import load_config
from wsbcn_d2.study import Failure, find_records, write_record
from wsbcn_d2.study.child import hardware

from .helpers import TOOL, load_tool, make_record

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def compare():
    return load_tool()


@pytest.mark.parametrize(
    "options,message",
    [
        (["--variants", "nosuch"], "not found"),
        (["--variants", "gn", "MODEL.NO_SUCH", "1"], "MODEL.NO_SUCH"),
        (["--variants", "gn", "--jobs", "0"], "--jobs"),
        (["--variants", "gn", "--sweep", "SOLVER.BASE_LR", "--jobs", "1"], "at least one value"),
        (["--variants", "gn", "--dataset-test", "no_such_set"], "not registered"),
        (["--variants", "gn", "--import", "no_such_module"], "no_such_module"),
        (["--variants", "gn", "--report-only"], "no run has finished"),
    ],
)
def test_wrong_input_is_answered_with_one_line(
    compare, options, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    output = tmp_path / "study"
    cut = next((i for i, o in enumerate(options) if o.startswith("MODEL")), len(options))
    argv = [*options[:cut], "--output", str(output), *options[cut:]]
    assert compare.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not output.exists()


def test_a_report_from_records_of_another_machine(compare, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    argv = ["--variants", "gn", "bcn", "--seeds", "1", "2", "--output", str(tmp_path / "here")]
    argv += ["--records", str(tmp_path / "there"), "--report-only"]
    for run in compare.plan(compare.parse(argv))[:3]:
        settings = {k: v for k, v in run.settings.items() if k != "SEED"}
        record = make_record(run.variant, seed=run.seed, settings=settings)
        write_record(record, tmp_path / "there" / f"{run.name}.json")
    assert compare.main(argv) == 0
    said = capsys.readouterr().out
    assert "4 runs, 3 of them finished already" in said and "| gn | 1 | 10.0 ± 0.0 |" in said
    assert "bcn_1img_seed2" in (tmp_path / "here" / "report.html").read_text()  # not run yet


@pytest.fixture
def records_of(compare, tmp_path):
    """Writes a record, of some AP and a name of its own, for each run that words ask for."""

    def write(argv, folder, box):
        for run in compare.plan(compare.parse(argv)):
            settings = {k: v for k, v in run.settings.items() if k != "SEED"}
            record = make_record("old name", seed=run.seed, settings=settings, box=box)
            write_record(record, tmp_path / folder / f"{run.name}.json")

    return write


def test_own_records_come_first_and_have_the_names_asked_for(
    compare, records_of, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    output = tmp_path / "out"
    argv = ["--variants", "gn", "--seeds", "1", "--output", str(output), "--report-only"]
    records_of(argv, "theirs", 20.0)
    argv += ["--records", str(tmp_path / "theirs")]
    assert compare.main(argv) == 0
    assert "| gn | 1 | 20.0 | 19.0 |" in capsys.readouterr().out
    records_of(argv, "out/records", 30.0)
    assert compare.main(argv) == 0
    assert "| gn | 1 | 30.0 | 29.0 |" in capsys.readouterr().out


def test_failed_and_interrupted_studies_say_so_by_their_exit_code(
    compare, records_of, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    output = tmp_path / "out"
    argv = ["--variants", "gn", "--seeds", "1", "--output", str(output)]
    records_of(argv, "out/records", 30.0)
    argv[2:4] = ["--seeds", "1", "2", "--jobs", "3", "--keep-checkpoints", "--pictures", "7"]
    asked = {}

    def fail(pending, root, command_of, **options):
        asked.update(options, runs=[run.seed for run in pending], root=root)
        asked["command"] = command_of(pending[0], Path("folder"))
        return [Failure(pending[0], "exit code 9: no memory", "log")]

    monkeypatch.setattr(compare, "check", lambda runs: None)
    monkeypatch.setattr(compare, "run_all", fail)
    assert compare.main(argv) == 1
    page = (output / "report.html").read_text()
    assert "exit code 9: no memory" in page and "| gn | 1 | 30.0 |" in capsys.readouterr().out
    assert (asked["runs"], asked["root"], asked["jobs"]) == ([2], output, 3)
    assert asked["keep_checkpoints"] is True
    assert asked["command"][asked["command"].index("--pictures") + 1] == "7"
    # No place of this machine: the command goes into records.
    assert asked["command"][asked["command"].index("--script") + 1] == "tools/train_net.py"
    assert asked["repeat_of"](compare.plan(compare.parse(argv))[0]).startswith(
        "python tools/train_net.py --config-file configs/"
    )

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "run_all", interrupt)
    assert compare.main(argv) == 130
    assert "the same command goes on from here" in capsys.readouterr().err


def test_every_variant_and_number_of_images_is_checked_once(compare, monkeypatch):
    monkeypatch.chdir(ROOT)
    checked = []
    monkeypatch.setattr(compare, "check_config", checked.append)
    words = "--variants gn bcn --images-per-step 1 2 --seeds 1 2 --output out"
    compare.check(compare.plan(compare.parse(words.split())))
    found = [(cfg.MODEL.RESNETS.NORM, cfg.SOLVER.IMS_PER_BATCH) for cfg in checked]
    assert sorted(found) == [("BCN", 1), ("BCN", 2), ("GN", 1), ("GN", 2)]


def test_defaults_of_a_study(compare):
    args = compare.parse(["--output", "out"])
    assert (args.variants, args.seeds, args.images_per_step) == (list(compare.ORDER), [1, 2, 3], [])
    assert (args.monitor_period, args.evaluations, args.pictures, args.jobs) == (100, 5, 4, 1)
    assert not args.keep_checkpoints and not args.report_only and args.max_iter is None


def test_variants_are_of_a_folder(compare, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = "--folder configs/nuclei --variants gn bcn_ws_held --seeds 1 --output out"
    runs = compare.plan(compare.parse(words.split()))
    assert [run.variant for run in runs] == ["gn", "bcn_ws_held"]
    assert runs[0].config_file == "configs/nuclei/mask_rcnn_R_18_FPN_gn.yaml"


def test_every_option_of_a_plan(compare, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = """
        --variants gn bcn --seeds 4 --images-per-step 2 --max-iter 60 --evaluations 3
        --dataset-train shapes_val --dataset-test shapes_train --monitor-period 7
        --sweep SOLVER.BASE_LR 0.01 0.04 --output out SOLVER.WEIGHT_DECAY 0.25
    """
    runs = compare.plan(compare.parse(words.split()))
    assert [run.variant for run in runs] == [
        *("gn BASE_LR=0.01", "gn BASE_LR=0.04", "bcn BASE_LR=0.01", "bcn BASE_LR=0.04")
    ]
    for run, rate in zip(runs, (0.01, 0.04) * 2, strict=True):
        cfg = load_config(run.config_file, run.overrides)
        # Given for the config's own one image per step.
        assert cfg.SOLVER.IMS_PER_BATCH == 2 and abs(cfg.SOLVER.BASE_LR - 2 * rate) < 1e-12
        assert (cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD, cfg.SEED) == (30, 10, 4)
        assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("shapes_val",), ("shapes_train",))
        assert (cfg.MODEL.BCN.MONITOR_PERIOD, cfg.SOLVER.WEIGHT_DECAY) == (7, 0.25)


def test_options_may_stand_in_a_file(compare, tmp_path, capsys):
    path = tmp_path / "study.args"
    path.write_text("# one\n--variants gn  bcn\n\n--title 'Two words' # two\n--output out A.B 1\n")
    args = compare.parse(["--seeds", "7", f"@{path}"])
    assert (args.variants, args.seeds, args.title) == (["gn", "bcn"], [7], "Two words")
    assert (args.output, args.opts) == ("out", ["A.B", "1"])
    with pytest.raises(SystemExit) as stopped:
        compare.parse(["@absent.args"])
    assert stopped.value.code == 2 and "absent.args" in capsys.readouterr().err


def test_hardware_is_one_line():
    assert hardware() and "\n" not in hardware()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    assert not names or hardware(gpu=False) == f"{names[0]}, {os.cpu_count()} cores"


@pytest.mark.slow
def test_a_small_study_from_end_to_end(tmp_path):
    """Two variants really trained, then the same command again."""
    (tmp_path / "tiny_sets.py").write_text(
        "from wsbcn_d2.data import register_shapes_split as add\n"
        "for split in ('train', 'val'):\n"
        "    add(f'tiny_{split}', 'sets', split, num_images=4, image_size=(64, 80))\n"
    )
    command = [sys.executable, str(TOOL), "--variants", "gn", "bcn_ws", "--seeds", "1"]
    command += ["--import", "tiny_sets", "--dataset-train", "tiny_train"]
    command += ["--dataset-test", "tiny_val", "--max-iter", "4", "--evaluations", "2"]
    command += ["--monitor-period", "2", "--pictures", "1", "--output", "out", *TINY]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}

    def study():
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900
        )
        logs = "".join(p.read_text()[-3000:] for p in tmp_path.glob("out/runs/*/output.txt"))
        assert done.returncode == 0, done.stderr[-3000:] + logs
        return done.stdout

    assert "2 runs, 0 of them finished already" in study()
    records = {record["variant"]: record for record in find_records(tmp_path / "out" / "records")}
    assert set(records) == {"gn", "bcn_ws"}
    for variant, record in records.items():
        assert set(record["ap"]) == {"bbox", "segm"}
        assert [point[0] for point in record["ap"]["bbox"]] == [2, 4]
        assert record["memory_mb"] > 100 and record["wall_seconds"] > 0
        assert record["step_seconds"] > 0 and record["train_seconds"] > 0
        errors = [name for name in record["channels"] if "estimate_error" in name]
        assert bool(errors) == (variant == "bcn_ws")
        assert "channels/mask_head/inactive_max" in record["channels"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/jpeg") == 3  # truth and two predictions
    assert not list(tmp_path.rglob("*.pth"))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("out/r*/**/*.json*")}
    assert "2 runs, 2 of them finished already" in study()
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert json.loads(next(tmp_path.glob("out/records/*.json")).read_text())["git"]


def test_other_defaults_of_a_study(compare):
    args = compare.parse(["--output", "out"])
    assert (args.records, args.strip, args.title) == ([], "", "Comparison over seeds")
    assert args.train_script == str(ROOT / "tools" / "train_net.py") and args.opts == []
    assert args.dataset_train is args.dataset_test is args.configs is None
