"""Running a plan: several processes at a time, resumable, with progress over all of them."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from ..engine.curves import read_metrics
from ..files import progress, take_lock
from .plan import Run
from .records import find_records, make_record, matching, write_record

__all__ = ["Failure", "child_command", "repeat_command", "run_all"]

_PATIENCE = 5.0  # seconds; the runs of a killed study end within one


@dataclass(frozen=True)
class Failure:
    """A run that did not finish: why, in one line, and where its output is."""

    run: Run
    reason: str
    log: str


def child_command(
    run: Run, folder: Path, *, script: str, modules: Sequence[str] = (), pictures: int = 0
) -> list[str]:
    """The command of one run's process; it starts the run, or continues it."""
    command = [sys.executable, "-m", "wsbcn_d2.study.child", "--script", script]
    command += ["--parent", str(os.getpid()), "--config-file", run.config_file]
    command += ["--folder", str(folder), "--pictures", str(pictures)]
    for name in modules:
        command += ["--import", name]
    return [*command, "--", *run.overrides]


def repeat_command(run: Run, script: str) -> str:
    """For the record: how to do this one run by hand."""
    return shlex.join(["python", script, "--config-file", run.config_file, *run.overrides])


class _Process:
    """One run that is under way."""

    def __init__(self, run: Run, folder: Path, command: list[str], env: dict[str, str], lock: IO):
        self.run, self.folder, self.lock = run, folder, lock
        self.log = folder / "output.txt"
        self.iterations = self._read_iterations()
        with self.log.open("ab") as log:
            # In a session of its own: Ctrl-C reaches the study, which then ends its runs.
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=env,
                start_new_session=True,
                pass_fds=[lock.fileno()],  # it may outlive a killed study for a moment
            )

    def _read_iterations(self) -> int:
        path = self.folder / "metrics.json"
        if not path.is_file():
            return 0
        series = read_metrics(str(path)).values()
        return min(1 + max((s[-1][0] for s in series), default=-1), self.run.max_iter)

    def progress(self) -> int:
        """Images seen since the last call."""
        before, self.iterations = self.iterations, max(self.iterations, self._read_iterations())
        return (self.iterations - before) * self.run.images_per_step

    def ask_to_stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)

    def stop(self, deadline: float) -> None:
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.lock.close()

    def reason(self) -> str:
        lines = [x.strip() for x in self.log.read_text(errors="replace").splitlines() if x.strip()]
        last = lines[-1] if lines else "no output"
        return f"exit code {self.process.returncode}: {last[:300]}"


def run_all(
    runs: Sequence[Run],
    root: str | os.PathLike,
    command_of: Callable[[Run, Path], list[str]],
    *,
    jobs: int = 1,
    repeat_of: Callable[[Run], str] = lambda run: "",
    keep_checkpoints: bool = False,
    on_record: Callable[[dict], None] = lambda record: None,
    poll_seconds: float = 1.0,
) -> list[Failure]:
    """Run everything, ``jobs`` at a time; write ``root/records/<name>.json`` for each that ends.

    Args:
        runs: those without a record.
        root: holds ``runs/<name>``, where an interrupted run goes on.
        command_of: (run, folder) to the command of its process.
        jobs: processes at a time; the cores are shared evenly unless OMP_NUM_THREADS is set.
        repeat_of: run to the command that goes into its record.
        keep_checkpoints: else a finished run's ``.pth`` files are removed.
        on_record: called with every new record.
        poll_seconds: how often to look.

    Returns:
        list[Failure]: runs that ended without a result, or that another study in the same folder
            is at; the others are not held up by them.
    """
    root = Path(root)
    threads = int(os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // jobs)))
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    waiting, active, failures = list(runs), [], []

    def settle(run: Run, ended: dict | Failure) -> None:
        if isinstance(ended, Failure):
            failures.append(ended)
            tqdm.write(f"failed: {run.name}: {ended.reason} (see {ended.log})")
        else:
            on_record(ended)
            figures = ", ".join(f"{k} AP {v:.1f}" for k, v in ended["final_ap"].items())
            tqdm.write(f"done: {run.name}: {figures}")

    total = sum(run.max_iter * run.images_per_step for run in runs)
    bar = progress(total=total, desc="images", unit="img", smoothing=0.05, disable=not runs)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                run = waiting.pop(0)
                started = _start(run, root, command_of, env)
                if isinstance(started, _Process):
                    active.append(started)
                    bar.update(started.iterations * run.images_per_step)
                else:
                    settle(run, started)
            time.sleep(poll_seconds)
            for item in list(active):
                bar.update(item.progress())
                if item.process.poll() is None:
                    continue
                active.remove(item)
                ended = _finish(item, root, repeat_of(item.run), threads, keep_checkpoints)
                item.lock.close()
                settle(item.run, ended)
            # Without a refresh, which would print a line each time where there is no terminal.
            left = f"{len(waiting) + len(active)} of {len(runs)} runs to go"
            bar.set_postfix_str(left, refresh=False)
    finally:
        for item in active:
            item.ask_to_stop()
        deadline = time.monotonic() + _PATIENCE
        for item in active:
            item.stop(deadline)
        signal.signal(signal.SIGTERM, previous)
        bar.close()
    return failures


def _start(run: Run, root: Path, command_of, env: dict[str, str]) -> _Process | dict | Failure:
    """A run's process; or, if a second study works in the same folder, what came of that."""
    folder = root / "runs" / run.name
    folder.mkdir(parents=True, exist_ok=True)
    lock = take_lock(folder / ".lock", _PATIENCE)
    if lock is None:
        reason = "another study is at it; once that has ended, the same command goes on"
        return Failure(run, reason, str(folder / "output.txt"))
    record = matching(run, find_records(root / "records"))
    if record is not None:
        lock.close()
        return record
    return _Process(run, folder, command_of(run, folder), env, lock)


def _finish(item: _Process, root: Path, repeat: str, threads: int, keep: bool) -> dict | Failure:
    if item.process.returncode:
        return Failure(item.run, item.reason(), str(item.log))
    try:
        record = make_record(item.run, item.folder, repeat, threads)
    except (OSError, ValueError, KeyError) as error:
        return Failure(item.run, f"no result: {error}", str(item.log))
    write_record(record, root / "records" / f"{item.run.name}.json")
    if not keep:
        for path in [*item.folder.glob("model_*.pth"), item.folder / "last_checkpoint"]:
            path.unlink(missing_ok=True)
        shutil.rmtree(item.folder / "inference", ignore_errors=True)
    return record
