"""Starting a job: Detectron2's launcher, or the environment of torchrun."""

import logging
import socket
import sys
from argparse import Namespace

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm

from wsbcn_d2.engine import launch, processes
from wsbcn_d2.engine.processes import (
    _run_rank,
    is_python,
    one_line_errors,
    run_command,
    world_size_of,
)


def arguments(**kwargs):
    defaults = dict(num_gpus=1, num_machines=1, machine_rank=0, dist_url="auto")
    return Namespace(**{**defaults, **kwargs})


@pytest.fixture
def no_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def torchrun(monkeypatch):
    """The environment of the only process of a torchrun job."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(comm, "_LOCAL_PROCESS_GROUP", None)


def test_world_size_by_the_command_line(no_torchrun):
    assert world_size_of(arguments()) == 1
    assert world_size_of(arguments(num_gpus=4, num_machines=2)) == 8


def test_world_size_by_torchrun(torchrun, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert world_size_of(arguments()) == 6


def test_one_process_runs_here_without_a_process_group(no_torchrun):
    seen = []
    args = arguments()
    launch(lambda given: seen.append((given, dist.is_initialized())), args)
    assert seen == [(args, False)]


def test_under_torchrun_this_process_is_one_of_the_job(torchrun):
    def main(args):
        assert dist.is_initialized()
        return args, dist.get_world_size(), comm.get_local_rank(), comm.get_local_size()

    args = arguments()
    assert launch(main, args) == (args, 1, 0, 1)
    assert not dist.is_initialized()


def test_under_torchrun_the_group_is_left_after_a_failure_too(torchrun):
    def main(args):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        launch(main, arguments())
    assert not dist.is_initialized()


@pytest.mark.parametrize("gpus", [False, True])
@pytest.mark.parametrize("machine, local", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_the_place_of_a_process_among_two_machines(machine, local, gpus, monkeypatch):
    """Ranks count machine by machine, and a machine's processes share a group."""
    done, rank = [], 2 * machine + local
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(device))
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: done.append((a, k)))
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "new_group", tuple)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("left"))
    monkeypatch.setattr(comm, "synchronize", lambda: done.append("waited"))
    monkeypatch.delattr(comm, "create_local_process_group", raising=False)
    monkeypatch.setattr(comm, "_LOCAL_PROCESS_GROUP", None)
    args = arguments(num_gpus=2, num_machines=2, machine_rank=machine)
    assert _run_rank(local, 2, lambda a: (a, len(done)), args, "tcp://x:1")[0] is args
    place = {"init_method": "tcp://x:1", "rank": rank, "world_size": 4}
    begun = (("nccl" if gpus else "gloo",), place)
    assert done == [*[local] * gpus, begun, "waited", "left"]
    assert ((0, 1) if machine == 0 else (2, 3)) == comm._LOCAL_PROCESS_GROUP


def test_a_command_keeps_its_name_and_what_it_says_of_itself():
    assert run_command.__name__ == "run_command" and "--num-gpus 0" in run_command.__doc__


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("absent.py", None, True),
        ("config.yaml", "model: {_target_: a.b}\n", True),
        ("config.yaml", "MODEL: {WEIGHTS: model}\n", False),
        ("config.yaml", "model: !!python/object/apply:os.abort []\n", False),
        ("absent.yaml", None, False),
        ("", None, False),
    ],
)
def test_a_python_config_is_known_by_its_name_or_by_what_its_run_has_saved(
    tmp_path, name, text, expected
):
    path = tmp_path / name
    if text:
        path.write_text(text)
    assert is_python(str(path) if name else "") is expected


@pytest.mark.parametrize("present", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_a_part_of_torchruns_environment_is_none(no_torchrun, monkeypatch, present):
    """As a scheduler may leave one of the variables behind."""
    monkeypatch.setenv(present, "3")
    assert world_size_of(arguments(num_gpus=2)) == 2


@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_where_there_are_gpus_detectron2_starts_the_processes(no_torchrun, monkeypatch, gpus):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(
        processes, "launch_detectron2", lambda *a, **k: asked.append((a, k)) or "result"
    )
    args = arguments(
        num_gpus=max(gpus, 1), num_machines=3 if gpus else 1, machine_rank=2, dist_url="tcp://x:1"
    )
    assert launch(print, args) == "result"
    place = {"num_machines": args.num_machines, "machine_rank": 2, "dist_url": "tcp://x:1"}
    assert asked == [((print, args.num_gpus), {**place, "args": (args,)})]


@pytest.mark.parametrize(
    "machines, given, own",
    [(1, "auto", True), (1, "tcp://x:1", True), (2, "tcp://x:1", False), (2, "auto", True)],
)
def test_processes_without_gpus_meet_in_a_file_or_where_they_are_told(
    no_torchrun, monkeypatch, machines, given, own
):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.multiprocessing, "spawn", lambda *a, **k: asked.append((a, k)))
    args = arguments(num_gpus=2, num_machines=machines, dist_url=given)
    assert launch(print, args) is None
    (((run, (size, main, passed, url)), options),) = asked
    assert run is _run_rank and (size, main, passed) == (2, print, args)
    assert options == {"nprocs": 2}
    assert (url.startswith("file:///") and url.endswith("/rendezvous")) if own else url == given


@pytest.mark.parametrize(
    "result, error, code",
    [
        (3, None, 3),
        (0, None, 0),
        (None, None, 0),
        ({"bbox": 1}, None, 0),
        (None, processes.UsageError("a\nb"), 2),
        (None, processes.DataError("no"), 2),
        (None, processes.CheckpointError("no"), 2),
    ],
)
def test_exit_codes(result, error, code, capsys):
    def command(*args, **options):
        assert (args, options) == ((1,), {"b": 2})
        if error:
            raise error
        return result

    assert one_line_errors(command)(1, b=2) == code
    assert capsys.readouterr().err == (f"error: {error}\n" if error else "")
    with pytest.raises(KeyError):
        one_line_errors(dict.__getitem__)({}, "what nobody has thought of")


@pytest.mark.parametrize(
    "config, words, expected",
    [
        ("a.yaml", ["--num-gpus", "0", "SEED", "3"], (1, ["SEED", "3", "MODEL.DEVICE", "cpu"])),
        ("a.py", ["--num-gpus", "0", "train.seed=3"], (1, ["train.seed=3", "train.device=cpu"])),
        ("a.yaml", ["--num-gpus", "2", "SEED", "3"], (2, ["SEED", "3"])),
        ("a.py", [], (1, [])),
    ],
)
def test_what_a_job_is_checked_and_run_with(
    no_torchrun, config, words, expected, monkeypatch, capsys
):
    seen = []
    monkeypatch.setattr(sys, "argv", ["train", "--config-file", config, "--resume", *words])
    monkeypatch.setattr(processes, "launch", lambda main, args: seen.append((main, args)))
    assert run_command(lambda args, **how: seen.append((args, how)), print) == 0
    (checked, how), (main, args) = seen
    assert checked is args and main is print and (args.num_gpus, args.opts) == expected
    assert how == {"world_size": expected[0], "eval_only": False, "resume": True}


@pytest.mark.parametrize("device, said", [("cpu", ["Running on the CPU"]), ("cuda", [])])
def test_the_log_is_the_packages_too(device, said, monkeypatch, caplog):
    done = []
    monkeypatch.setattr(processes, "default_setup", lambda *a: done.append(a))
    monkeypatch.setattr(processes, "setup_logger", lambda *a, **k: done.append((a, k)))
    monkeypatch.setattr(comm, "get_rank", lambda: 5)
    with caplog.at_level(logging.INFO, logger="wsbcn_d2"):
        processes.set_up_process("cfg", "args", "folder", device)
    assert done == [("cfg", "args"), (("folder",), {"distributed_rank": 5, "name": "wsbcn_d2"})]
    assert [record.getMessage() for record in caplog.records] == said
