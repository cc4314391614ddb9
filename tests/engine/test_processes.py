"""Starting a job: Detectron2's launcher, or the environment of torchrun."""

import socket
from argparse import Namespace

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm

from wsbcn_d2.engine import launch
from wsbcn_d2.engine.processes import _run_rank, is_python, run_command, world_size_of


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
