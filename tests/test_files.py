"""Writing, locking and progress: whole files, one writer at a time, readable logs."""

import fcntl
import io
import multiprocessing
import os
import signal
import sys
import threading
import time

import pytest

from wsbcn_d2.checkpoint.catalog import fetching
from wsbcn_d2.data import default_root
from wsbcn_d2.data.checks import memory
from wsbcn_d2.files import PART_FILE, locked, progress, replacing, take_lock
from wsbcn_d2.layers.kernels import build

FORK = multiprocessing.get_context("fork")  # has everything imported


def test_a_written_file_replaces_the_old_one_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "new" / "file"
    for text in ("first", "second, longer", "3"):
        with replacing(target) as part, open(part, "w") as stream:
            stream.write(text)
            if text != "first":
                assert target.read_text() != text
        assert target.read_text() == text
    assert os.listdir(target.parent) == ["file"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_error_the_old_file_is_whole_and_the_part_is_gone(tmp_path, error):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(error), replacing(target) as part:
        with open(part, "w") as stream:
            stream.write("half of the ne")
        raise error
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_killed_writer_left_is_taken_over(tmp_path):
    (tmp_path / PART_FILE).write_bytes(b"x" * 1000)
    with replacing(tmp_path / "file") as part, open(part, "wb") as stream:
        stream.write(b"short")
    assert (tmp_path / "file").read_bytes() == b"short"
    assert os.listdir(tmp_path) == ["file"]


def test_data_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *a: (order.append("replace"), replace(*a)))
    with replacing(tmp_path / "file") as part, open(part, "w") as stream:
        stream.write("text")
    assert order == ["fsync", "replace"]


def write_often(folder, name, times):
    for i in range(times):
        with replacing(os.path.join(folder, name)) as part, open(part, "w") as stream:
            for _ in range(50):
                stream.write(f"{name}{i};")
                stream.flush()


@pytest.mark.slow
def test_writers_in_one_folder_do_not_mix(tmp_path):
    writers = [FORK.Process(target=write_often, args=(tmp_path, n, 100)) for n in ("a", "b", "a")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    for name in ("a", "b"):
        assert (tmp_path / name).read_text() == f"{name}99;" * 50
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def hold(path, seconds, ready):
    with locked(path):
        ready.set()
        time.sleep(seconds)


def test_a_lock_is_waited_for_and_patience_ends_in_one_line(tmp_path):
    path, ready = tmp_path / "lock", FORK.Event()
    holder = FORK.Process(target=hold, args=(path, 60, ready))
    holder.start()
    assert ready.wait(60)
    assert take_lock(path, 0.2) is None
    held = pytest.raises(TimeoutError, match="another process has held .*lock for 0.2 s: wait")
    with held, locked(path, 0.2):
        pytest.fail("both hold it")
    os.kill(holder.pid, signal.SIGKILL)  # a killed process holds nothing
    with locked(path, 10):
        pass
    holder.join()


def test_a_lock_is_given_back_at_once_after_an_error(tmp_path):
    """Not when the last who looks at the error has let go of it."""
    with pytest.raises(ValueError) as error, locked(tmp_path / "lock"):
        raise ValueError("kept")
    assert str(error.value) == "kept"
    with take_lock(tmp_path / "lock", 0):
        assert take_lock(tmp_path / "lock", 0) is None


def test_a_writer_that_waited_holds_the_name_and_not_the_file_it_waited_for(tmp_path):
    """Its lock was on a file that the first writer has renamed meanwhile."""
    seen = []

    def write():
        with replacing(tmp_path / "b") as part, open(part, "w") as stream:
            stream.write("second")
            stream.flush()
            with open(part, "ab") as third:
                try:
                    fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    seen.append("a third one writes too")
                except BlockingIOError:
                    seen.append("alone")

    second = threading.Thread(target=write)
    with replacing(tmp_path / "a") as part, open(part, "w") as stream:
        second.start()
        time.sleep(0.3)  # it has opened the file, and waits for its lock
        stream.write("first")
    second.join(60)
    assert seen == ["alone"]
    assert [(tmp_path / name).read_text() for name in "ab"] == ["first", "second"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("terminal, seconds", [(True, 0.1), (False, 30.0)])
def test_how_often_progress_is_shown(monkeypatch, terminal, seconds):
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", screen)
    assert progress(range(3), file=screen).mininterval == seconds
    assert progress(total=3, file=screen, period=7.0).mininterval == (0.1 if terminal else 7.0)


FOLDERS = {  # variable, where it points, and where each thing then lies; the last one without it
    "published checkpoints": (
        lambda: fetching._private_folder(None),
        [("FVCORE_CACHE", "{}/x", "{}/x/wsbcn_d2"), (None, "", "~/.torch/iopath_cache/wsbcn_d2")],
    ),
    "looks at data sets": (
        memory._folder,
        [
            ("XDG_CACHE_HOME", "{}/x", "{}/x/wsbcn_d2/datasets"),
            (None, "", "~/.cache/wsbcn_d2/datasets"),
        ],
    ),
    "kernels": (
        build._cache_folder,
        [("XDG_CACHE_HOME", "{}/x", "{}/x/wsbcn_d2"), (None, "", "~/.cache/wsbcn_d2")],
    ),
    "data sets": (
        default_root,
        [("DETECTRON2_DATASETS", "~/x", "~/x"), (None, "", "datasets")],
    ),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_where_things_lie(what, tmp_path, monkeypatch):
    folder_of, cases = FOLDERS[what]
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for variable, value, expected in cases:
        for name in ("FVCORE_CACHE", "XDG_CACHE_HOME", "DETECTRON2_DATASETS"):
            monkeypatch.delenv(name, raising=False)
        if variable:
            monkeypatch.setenv(variable, value.format(tmp_path))
        assert str(folder_of()) == expected.format(tmp_path).replace("~", str(home))
    assert fetching._private_folder(str(tmp_path / "own")) == str(tmp_path / "own" / "wsbcn_d2")


def test_progress_writes_few_lines_into_a_log(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    for _ in progress(range(1000), desc="looking", file=log):
        pass
    lines = log.getvalue().replace("\r", "").splitlines()
    assert len([line for line in lines if line]) <= 3
    assert "looking: 100% 1000/1000" in log.getvalue()


def test_a_log_is_not_written_to_more_often_than_is_said(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    bar = progress(total=4, file=log, period=7.0, desc="looking")
    assert (bar.mininterval, bar.maxinterval) == (7.0, 7.0)
    own = progress(total=4, file=log, mininterval=1.5)  # who says more is heard
    assert (own.mininterval, own.maxinterval) == (1.5, 30.0)
    log.truncate(0)
    bar.update(3)
    bar.set_postfix_str("1 to go")
    last = log.getvalue().replace("\r", "").strip("\0").rstrip().splitlines()[-1]
    assert last.startswith("looking:  75% 3/4 [") and last.endswith(", 1 to go]")


def test_a_lock_that_is_held_for_a_while_is_had_in_the_end(tmp_path, monkeypatch):
    """With no patience it is tried once; with none given, until it is had."""
    pauses = []
    first = take_lock(tmp_path / "lock")
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(time, "monotonic", lambda: 100.0 + sum(pauses))
    assert take_lock(tmp_path / "lock", 0.35) is None and pauses == [0.1] * 4
    pauses.clear()
    monkeypatch.setattr(
        time, "sleep", lambda seconds: (pauses.append(seconds), len(pauses) < 50 or first.close())
    )
    with take_lock(tmp_path / "lock"):
        assert pauses == [0.1] * 50
