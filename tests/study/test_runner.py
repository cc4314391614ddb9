"""Running, stopping and going on, with a trainer that takes no time."""

import functools
import json
import os
import platform
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import detectron2
import pytest
import torch

from wsbcn_d2.study import (
    Run,
    find_records,
    make_record,
    matching,
    records,
    run_all,
    runner,
    summarize,
)
from wsbcn_d2.study.runner import child_command, repeat_command
from wsbcn_d2.study.summary import table

# Writes what Detectron2 writes, ten iterations at a time; says on which iteration it began.
TRAINER = """
import json, pathlib, sys, time
folder, fail, pause = pathlib.Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
path = folder / "metrics.json"
rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
start = rows[-1]["iteration"] + 1 if rows else 0
(folder / "starts.txt").open("a").write(f"{start}\\n")
(folder / "model_final.pth").write_text("weights")
(folder / "last_checkpoint").write_text("model_final.pth")
(folder / "inference").mkdir(exist_ok=True)
for iteration in range(start + 9, 40, 10):
    if fail == "yes":
        print("Traceback ...\\nFloatingPointError: Loss became infinite or NaN")
        sys.exit(1)
    row = {"iteration": iteration, "time": 0.5, "total_loss": 3.0 - iteration / 20}
    row |= {"channels/fpn/shift_mean": 0.1, "bbox/AP": float(iteration), "segm/AP": float("nan")}
    path.open("a").write(json.dumps(row) + "\\n")
    time.sleep(pause)
session = {"wall_seconds": 3, "memory_mb": 100 + start, "memory_kind": "RSS", "hardware": "none"}
(folder / "sessions.jsonl").open("a").write(json.dumps(session) + "\\n")
"""


def make_run(variant, seed=1):
    settings = {"SEED": seed, "SOLVER.MAX_ITER": 40, "SOLVER.IMS_PER_BATCH": 2, "X": variant}
    return Run(variant, f"{variant}.yaml", ("SEED", str(seed)), settings)


@pytest.fixture
def command_of(tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)

    def make(run, folder, pause=0.0):
        fail = "yes" if run.variant == "bad" else "no"
        return [sys.executable, str(script), str(folder), fail, str(pause)]

    return make


def starts(root, run):
    return (root / "runs" / run.name / "starts.txt").read_text().split()


def test_records_of_what_ran(tmp_path, command_of):
    runs, seen = [make_run("a"), make_run("b")], []
    failures = run_all(runs, tmp_path, command_of, jobs=2, on_record=seen.append, poll_seconds=0.05)
    assert failures == []
    records = find_records(tmp_path / "records")
    assert sorted(r["variant"] for r in seen) == [r["variant"] for r in records] == ["a", "b"]
    record = matching(runs[0], records)
    assert record["final_ap"] == {"bbox": 39.0, "segm": 0.0}  # NaN: nothing detected
    # Iterations from 1; half a second a step.
    assert record["ap"]["bbox"] == [[i + 1, (i + 1) / 2, float(i)] for i in (9, 19, 29, 39)]
    assert (record["step_seconds"], record["train_seconds"]) == (0.5, 20.0)
    assert (record["memory_mb"], record["wall_seconds"]) == (100, 3)
    assert record["loss"][-1] == [39, pytest.approx(1.05)]
    assert record["channels"]["channels/fpn/shift_mean"][0] == [9, 0.1]
    assert (record["images_per_step"], record["max_iter"]) == (2, 40)
    assert record["versions"]["torch"]
    assert len((tmp_path / "records" / f"{runs[0].name}.json").read_bytes()) < 20_000
    for name in ("*.pth", "last_checkpoint", "inference"):  # many runs would fill the disk
        assert not list(tmp_path.rglob(name))


def test_checkpoints_may_be_kept_and_looks_are_some_time_apart(tmp_path, command_of, monkeypatch):
    stock, pauses = time.sleep, []
    monkeypatch.setattr(time, "sleep", lambda seconds: (pauses.append(seconds), stock(seconds)))
    run = make_run("a")
    assert run_all([run], tmp_path, command_of, keep_checkpoints=True, poll_seconds=0.07) == []
    folder = tmp_path / "runs" / run.name
    assert all((folder / name).exists() for name in ("model_final.pth", "last_checkpoint"))
    assert pauses and set(pauses) == {0.07}


def test_progress_is_in_images_and_says_how_many_runs_are_left(tmp_path, command_of, monkeypatch):
    updates, said, how = [], [], {}

    class Bar:
        close = staticmethod(lambda: said.append("closed"))
        update = staticmethod(updates.append)

        def set_postfix_str(self, text, refresh):
            said.append((text, refresh))

    monkeypatch.setattr(runner, "progress", lambda **options: how.update(options) or Bar())
    assert run_all([make_run("a"), make_run("b")], tmp_path, command_of, poll_seconds=0.05) == []
    assert how["total"] == sum(updates) == 2 * 40 * 2  # runs, iterations, images per step
    lines = [(f"{left} of 2 runs to go", False) for left in (2, 1, 0)]
    assert set(said[:-2]) <= set(lines) and said[0] != lines[2]
    assert said[-2:] == [lines[2], "closed"]


def test_a_last_line_that_is_no_text_is_told_all_the_same(tmp_path):
    code = "import sys; sys.stdout.buffer.write(b'\\n \\xff broken \\n\\n'); sys.exit(3)"
    (failure,) = run_all(
        [make_run("a")], tmp_path, lambda *_: [sys.executable, "-c", code], poll_seconds=0.05
    )
    assert failure.reason == "exit code 3: \ufffd broken"


def test_a_failing_run_is_reported_and_the_others_go_on(tmp_path, command_of):
    runs = [make_run("bad"), make_run("good")]
    (failure,) = run_all(runs, tmp_path, command_of, poll_seconds=0.05)
    assert failure.run is runs[0]
    assert "exit code 1: FloatingPointError: Loss became infinite" in failure.reason
    assert Path(failure.log).is_file()
    records = find_records(tmp_path / "records")
    assert [record["variant"] for record in records] == ["good"]
    assert matching(runs[0], records) is None  # it is tried again next time


def test_a_run_without_a_result_is_a_failure(tmp_path):
    (failure,) = run_all(
        [make_run("a")], tmp_path, lambda run, folder: [sys.executable, "-c", ""], poll_seconds=0.05
    )
    assert "no result" in failure.reason


def test_a_classifiers_accuracy_is_its_result(tmp_path):
    row = {"iteration": 39, "time": 0.5, "classification/top1": 81.5, "classification/top5": 99.0}
    (tmp_path / "metrics.json").write_text(json.dumps(row) + "\n")
    record = make_record(make_run("a"), tmp_path, "", 1)
    assert record["final_ap"] == {"classification": 81.5}
    head, cells = table(summarize([record]))
    assert cells[0][head.index("top-1 accuracy")] == "81.5"


def in_folder(folder, rows, sessions):
    """What a run leaves: lines of metrics.json and sessions.jsonl."""
    for name, lines in (("metrics.json", rows), ("sessions.jsonl", sessions)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_every_number_of_a_run_of_three_sessions(tmp_path):
    """Times and memory are of all of them, the machine is the last one's."""
    nan = float("nan")
    rows = [
        {"iteration": 9, "time": 0.5, "total_loss": 3.0, "channels/fpn/shift_mean": nan},
        {"iteration": 19, "time": 0.5, "total_loss": nan, "bbox/AP": 12.5},
        {"iteration": 39, "time": 2.0, "total_loss": 1.0, "bbox/AP": 25.0},
    ]
    memory = ((3.04, 200, "RSS", "old"), (5.04, 300, "RSS", "old"), (1.0, 100, "CUDA", "new"))
    names = ("wall_seconds", "memory_mb", "memory_kind", "hardware")
    in_folder(tmp_path, rows, [dict(zip(names, values, strict=True)) for values in memory])
    record = make_record(make_run("a"), tmp_path, "python x", 3)
    # 20 steps of 0.5 s, 20 of 2 s.
    assert record["ap"] == {"bbox": [[20, 10.0, 12.5], [40, 50.0, 25.0]]}
    assert (record["train_seconds"], record["step_seconds"]) == (50.0, 0.5)
    assert (record["wall_seconds"], record["memory_mb"]) == (9.1, 300)
    assert (record["memory_kind"], record["hardware"]) == ("CUDA", "new")
    assert record["loss"] == [[9, 3.0], [39, 1.0]]  # what is not finite is left out
    assert record["channels"] == {"channels/fpn/shift_mean": []}
    assert (record["command"], record["threads"], record["seed"]) == ("python x", 3, 1)
    json.dumps(record, allow_nan=False)


def test_a_run_that_noted_nothing_has_a_result_all_the_same(tmp_path):
    in_folder(tmp_path, [{"iteration": 39, "bbox/AP": 25.0}], [])
    record = make_record(make_run("a"), tmp_path, "", 1)
    assert record["ap"] == {"bbox": [[40, 0.0, 25.0]]}
    for key in ("step_seconds", "memory_mb", "memory_kind"):
        assert record[key] is None
    assert record["wall_seconds"] == 0


def test_long_curves_are_averaged_to_fifty_points(tmp_path):
    rows = [{"iteration": i, "total_loss": float(i % 2)} for i in range(100)]
    in_folder(tmp_path, [*rows, {"iteration": 99, "total_loss": 1.0, "bbox/AP": 1.0}], [])
    run = Run("a", "a.yaml", (), {"SEED": 1, "SOLVER.MAX_ITER": 100})
    loss = make_record(run, tmp_path, "", 1)["loss"]
    assert loss == [[round(i + 0.5), 0.5] for i in range(0, 100, 2)]


def test_the_code_of_a_record_says_whether_it_was_changed(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        subprocess, "check_output", lambda command, **_: asked.append(command) or "abc-dirty\n"
    )
    in_folder(tmp_path, [{"iteration": 39, "bbox/AP": 25.0}], [])
    assert make_record(make_run("a"), tmp_path, "", 1)["git"] == "abc-dirty"
    assert asked[0][:2] == ["git", "-C"] and "--dirty" in asked[0]
    assert (Path(asked[0][2]) / "wsbcn_d2").is_dir()


@pytest.mark.parametrize("given, threads", [(None, "2"), ("5", "5")])
def test_runs_share_the_cores_and_hold_their_lock_themselves(tmp_path, monkeypatch, given, threads):
    """A run may outlive a killed study for a moment, in which nobody else may begin it."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    code = textwrap.dedent("""
        import os, pathlib
        print("threads", os.environ["OMP_NUM_THREADS"])
        print("path", os.environ["PYTHONPATH"].split(os.pathsep)[0])
        print("session", os.getsid(0) == os.getpid())
        files = (os.path.realpath(f) for f in pathlib.Path("/proc/self/fd").iterdir())
        print("lock", any(f.endswith("/.lock") for f in files))
    """)
    run = make_run("a")
    failures = run_all(
        [run], tmp_path, lambda *_: [sys.executable, "-c", code], jobs=3, poll_seconds=0.05
    )
    said = (tmp_path / "runs" / run.name / "output.txt").read_text().splitlines()
    root = Path(__file__).resolve().parents[2]
    assert said == [f"threads {threads}", f"path {root}", "session True", "lock True"]
    assert len(failures) == 1


def test_a_run_that_is_killed_after_its_last_evaluation_has_not_finished(tmp_path, command_of):
    run = make_run("a")

    def command(run, folder):
        _, script, *words = command_of(run, folder)
        end = "import os, runpy, sys; sys.argv[:] = sys.argv[1:]; runpy.run_path(sys.argv[0])\n"
        return [sys.executable, "-c", f"{end}os.kill(os.getpid(), 9)", script, *words]

    (failure,) = run_all([run], tmp_path, command, poll_seconds=0.05)
    assert failure.reason == "exit code -9: no output"
    assert not find_records(tmp_path / "records") and starts(tmp_path, run) == ["0"]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, command_of):
    run = make_run("a")
    folder = tmp_path / "runs" / run.name
    folder.mkdir(parents=True)
    lines = [json.dumps({"iteration": i, "time": 0.5, "bbox/AP": 1.0}) for i in (9, 19)]
    (folder / "metrics.json").write_text("\n".join(lines) + "\n")
    assert run_all([run], tmp_path, command_of, poll_seconds=0.05) == []
    assert starts(tmp_path, run) == ["20"]


def test_two_studies_in_one_folder_do_not_touch_each_others_runs(tmp_path, command_of, monkeypatch):
    assert runner._PATIENCE == 5  # the runs of a killed study end within a second
    monkeypatch.setattr(runner, "_PATIENCE", 0.1)
    a, b = make_run("a"), make_run("b")
    second, asked = [], []

    def start_the_second_meanwhile(run, folder):
        """While the first study starts run a, another one wants it, and b."""
        if not asked:
            asked.append(run)
            second.append(run_all([a, b], tmp_path, command_of, poll_seconds=0.05))
        return command_of(run, folder)

    seen = []
    first = run_all(
        [a, b], tmp_path, start_the_second_meanwhile, on_record=seen.append, poll_seconds=0.05
    )
    ((failure,),) = second
    assert failure.run is a and "another study is at it" in failure.reason
    assert first == [] and [record["variant"] for record in seen] == ["a", "b"]
    assert starts(tmp_path, a) == starts(tmp_path, b) == ["0"]  # b by the second, once


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "kill"])
def test_a_stopped_study_stops_its_runs_and_continues(tmp_path, command_of, number):
    """Stopped in the middle of a run, in a process of its own; then the same command again."""
    script = tmp_path / "study.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})
        from wsbcn_d2.study import Run, run_all
        run = Run("a", "a.yaml", ("SEED", "1"), {make_run("a").settings!r})
        command = {command_of(make_run("a"), Path("FOLDER"), pause=30)!r}
        place = lambda run, folder: [str(folder) if c == "FOLDER" else c for c in command]
        run_all([run], {str(tmp_path)!r}, place, poll_seconds=0.05)
        """)
    )
    run = make_run("a")
    study = subprocess.Popen(
        [sys.executable, str(script)],
        stderr=subprocess.DEVNULL,
        # A shell that runs the tests in the background has them, and so the study, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    metrics = tmp_path / "runs" / run.name / "metrics.json"
    try:
        deadline = time.monotonic() + 120
        while not (metrics.is_file() and metrics.read_text()):
            assert time.monotonic() < deadline and study.poll() is None
            time.sleep(0.05)
        study.send_signal(number)
        assert study.wait(120) != 0
    finally:
        study.kill()
    assert not _running(str(tmp_path / "trainer.py"))
    assert find_records(tmp_path / "records") == []
    assert run_all([run], tmp_path, command_of, poll_seconds=0.05) == []
    assert starts(tmp_path, run) == ["0", "10"]


def _running(text):
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if text in words:
            found.append(path.parent.name)
    return found


def test_a_run_ends_when_its_study_was_killed(tmp_path):
    """SIGKILL leaves the study no chance to end its runs."""
    child = "from wsbcn_d2.study.child import end_with_parent; import os, sys, time; "
    child += "end_with_parent(os.getppid()); print(os.getpid(), flush=True); time.sleep(100)"
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    study = subprocess.Popen(
        [sys.executable, "-c", parent, child], stdout=subprocess.PIPE, text=True, env=env
    )
    pid = int(study.stdout.readline())
    study.kill()
    study.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}/cmdline").exists() and time.monotonic() < deadline:
        if not Path(f"/proc/{pid}/cmdline").read_bytes():  # a zombie: nobody collects it here
            break
        time.sleep(0.1)
    else:
        assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("word", ["('x',)", "$HOME", "a'b", 'a"b', "`id`", "", "a;b", "*", "x\ny"])
def test_the_command_of_a_run_can_be_pasted(word):
    run = Run("a", "my configs/a.yaml", ("DATASETS.TEST", word, "SEED", "1"), {"SEED": 1})
    text = repeat_command(run, "tools/train_net.py")
    # What a shell makes of it, as a program sees it.
    show = f"python() {{ printf '%s\\0' \"$@\"; }}; {text}"
    done = subprocess.run(["bash", "-c", show], capture_output=True, text=True, check=True)
    words = ["tools/train_net.py", "--config-file", "my configs/a.yaml"]
    assert done.stdout.split("\0")[:-1] == [*words, "DATASETS.TEST", word, "SEED", "1"]


@pytest.mark.parametrize("missing", ["last iteration", "one task's last"])
def test_a_run_that_stopped_short_does_not_count_as_finished(tmp_path, missing):
    """Though its process ended well: only an AP of the last iteration is a result."""
    run = make_run("a")
    rows = [{"iteration": i, "time": 0.5, "bbox/AP": 1.0, "segm/AP": 1.0} for i in (9, 19, 29, 39)]
    if missing == "last iteration":
        del rows[-1]
    else:
        del rows[-1]["segm/AP"]
    write = "import sys; open(sys.argv[1] + '/metrics.json', 'w').write(sys.argv[2])"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (failure,) = run_all(
        [run],
        tmp_path,
        lambda run, folder: [sys.executable, "-c", write, str(folder), text],
        poll_seconds=0.05,
    )
    assert "no result: no AP of iteration 40" in failure.reason
    assert find_records(tmp_path / "records") == []


def test_a_log_gets_few_lines(tmp_path, command_of, capsys):
    """Where there is no terminal, not a line per look: one at the start and at the end, at most."""
    place = functools.partial(command_of, pause=0.2)
    assert run_all([make_run("a"), make_run("b")], tmp_path, place, poll_seconds=0.01) == []
    said = capsys.readouterr()
    done = [line for line in said.out.splitlines() if line]
    assert [line.split("_")[0] for line in done] == ["done: a", "done: b"]
    lines = [line for line in said.err.splitlines() if line.strip()]
    assert len(lines) <= 4 and "100% 160/160" in lines[-1]


def test_a_stopped_run_may_note_its_session(tmp_path):
    """It is asked to end, and killed only if it does not."""
    code = (
        "import pathlib, signal, sys, time\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "def end(*_):\n    (folder / 'noted').touch()\n    sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "(folder / 'ready').touch()\n"
        "time.sleep(60)\n"
    )
    run = make_run("a")
    folder = tmp_path / "runs" / run.name

    def stop_when_ready():
        while not (folder / "ready").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    def command(run, folder):
        threading.Timer(0.1, stop_when_ready).start()
        return [sys.executable, "-c", code, str(folder)]

    with pytest.raises(KeyboardInterrupt):
        run_all([run], tmp_path, command, poll_seconds=0.05)
    assert (folder / "noted").exists()


@pytest.mark.parametrize(
    "way, patience, least, most", [("SIG_IGN", 2.0, 2.0, 6.0), ("SIG_DFL", 20.0, 0.0, 15.0)]
)
def test_runs_are_stopped_together(tmp_path, monkeypatch, way, patience, least, most):
    """At once if they listen; else after one patience for all of them, not one for each."""
    begin = f"import signal, time; signal.signal(signal.SIGTERM, signal.{way}); print('ready', "
    command = [sys.executable, "-c", begin + "flush=True); time.sleep(60)"]
    monkeypatch.setattr(runner, "_PATIENCE", patience)
    runs = [make_run(name) for name in "abcd"]
    folders = [tmp_path / "runs" / run.name for run in runs]
    stopped = []

    def stop_when_ready():
        while not all("ready" in (f / "output.txt").read_text() for f in folders if f.is_dir()):
            time.sleep(0.05)
        stopped.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    def commands(run, folder):
        if run is runs[-1]:
            threading.Timer(1.0, stop_when_ready).start()
        return command

    with pytest.raises(KeyboardInterrupt):
        run_all(runs, tmp_path, commands, jobs=4, poll_seconds=0.05)
    assert least <= time.monotonic() - stopped[0] < most


def test_the_command_of_a_runs_process(tmp_path):
    run = Run("a", "a b.yaml", ("SEED", "1", "A.B", "c d"), {"SEED": 1})
    begin = [sys.executable, "-m", "wsbcn_d2.study.child", "--script", "t.py"]
    begin += ["--parent", str(os.getpid()), "--config-file", "a b.yaml", "--folder", str(tmp_path)]
    end = ["--", "SEED", "1", "A.B", "c d"]
    plain = child_command(run, tmp_path, script="t.py")
    assert plain == [*begin, "--pictures", "0", *end]
    more = child_command(run, tmp_path, script="t.py", modules=["m", "n"], pictures=3)
    assert more == [*begin, "--pictures", "3", "--import", "m", "--import", "n", *end]


def test_more_jobs_than_cores_have_a_thread_each(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    code = "import os; print(os.environ['OMP_NUM_THREADS'])"
    command = [sys.executable, "-c", code]
    run_all([make_run("a")], tmp_path, lambda *_: command, jobs=3, poll_seconds=0.05)
    (log,) = tmp_path.rglob("output.txt")
    assert log.read_text() == "1\n"


def test_what_is_said_of_runs_that_have_ended(tmp_path, command_of, capsys):
    runs = [make_run("bad"), make_run("good")]
    (failure,) = run_all(runs, tmp_path, command_of, poll_seconds=0.05)
    said = capsys.readouterr().out.splitlines()
    reason = "exit code 1: FloatingPointError: Loss became infinite or NaN"
    assert (failure.reason, failure.log) == (
        reason,
        str(tmp_path / "runs" / runs[0].name / "output.txt"),
    )
    assert said == [
        f"failed: {runs[0].name}: {reason} (see {failure.log})",
        f"done: {runs[1].name}: bbox AP 39.0, segm AP 0.0",
    ]


@pytest.mark.parametrize(
    "code, reason",
    [
        ("import sys; sys.exit(5)", "exit code 5: no output"),
        ("print('x' * 400); raise SystemExit(1)", "exit code 1: " + "x" * 300),
    ],
)
def test_a_reason_is_one_line_and_not_a_long_one(tmp_path, code, reason):
    command = [sys.executable, "-c", code]
    (failure,) = run_all([make_run("a")], tmp_path, lambda *_: command, poll_seconds=0.05)
    assert failure.reason == reason


def test_what_a_record_says_besides_its_numbers(tmp_path, monkeypatch):
    rows = [{"iteration": 39, "time": 0.123456789, "total_loss": 1.23456, "bbox/AP": 25.0}]
    in_folder(tmp_path, rows, [])
    monkeypatch.setattr(time, "gmtime", lambda: time.struct_time((2031, 2, 3, 23, 0, 0, 0, 34, 0)))
    monkeypatch.setattr(records, "has_compiled_ops", lambda: False)
    run = make_run("a")
    record = make_record(run, tmp_path, "", 1)
    assert (record["format"], record["variant"], record["config_file"]) == (1, "a", "a.yaml")
    assert (record["digest"], record["settings"]) == (run.digest, run.settings)
    assert record["learning_rate"] == 0.001  # Detectron2's own, which the run has not changed
    assert record["ap_columns"] == ["iteration", "training seconds", "AP"]
    assert record["loss"] == [[39, 1.235]]  # four digits of it
    assert (record["step_seconds"], record["train_seconds"]) == (0.12346, 4.9)
    assert record["finished"] == "2031-02-03"
    assert record["versions"] == {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "detectron2": f"{detectron2.__version__} (pure Python)",
        "platform": sys.platform,
    }
    assert record["hardware"] == platform.machine()  # no session has told more
    run.settings["SOLVER.BASE_LR"] = 0.5
    monkeypatch.setattr(records, "has_compiled_ops", lambda: True)
    record = make_record(run, tmp_path, "", 1)
    assert record["learning_rate"] == 0.5
    assert record["versions"]["detectron2"].endswith(" (compiled)")


def test_a_record_is_json_that_others_read(tmp_path):
    path = tmp_path / "a" / "b.json"
    records.write_record({"z": 1, "a": 2.5}, path)
    assert path.read_text() == '{"a": 2.5, "z": 1}\n'
    with pytest.raises(ValueError):
        records.write_record({"a": float("nan")}, path)
    assert path.read_text() == '{"a": 2.5, "z": 1}\n' and len(list(path.parent.iterdir())) == 1
