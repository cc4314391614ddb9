"""Starting a job: Detectron2's launcher, or the environment of torchrun."""

import socket
from argparse import Namespace

import pytest
import torch.distributed as dist
from detectron2.utils import comm

from wsbcn_d2.engine import launch
from wsbcn_d2.engine.processes import is_python, run_command, world_size_of


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
