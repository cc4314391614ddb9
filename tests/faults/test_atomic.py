"""Full disks, damaged files and interrupted writes, without a training run."""

import errno
import os

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from wsbcn_d2.checkpoint import CheckpointError, WSBCNCheckpointer
from wsbcn_d2.checkpoint.saving import AtomicSaving, usable_checkpoints
from wsbcn_d2.files import PART_FILE


class Plain(AtomicSaving, DetectionCheckpointer):
    """The mixin alone."""


class State:
    """Something with a state besides the model."""

    def __init__(self, iteration):
        self.iteration = iteration

    def state_dict(self):
        return {"iteration": self.iteration}

    def load_state_dict(self, state):
        self.iteration = state["iteration"]


def make(folder, cls=WSBCNCheckpointer, value=0.0):
    model = nn.Linear(300, 300)
    nn.init.constant_(model.weight, value)
    return cls(model, str(folder), trainer=State(int(value)))


@pytest.fixture(params=[WSBCNCheckpointer, Plain])
def saved(request, tmp_path):
    """Two whole checkpoints, model_1 and then model_2."""
    for value in (1, 2):
        make(tmp_path, request.param, float(value)).save(f"model_{value}")
        os.utime(tmp_path / f"model_{value}.pth", (value, value))
    return tmp_path, request.param


def resume(folder, cls):
    checkpointer = make(folder, cls, 9.0)
    checkpointer.resume_or_load("", resume=True)
    return checkpointer.checkpointables["trainer"].iteration


def test_saving_and_resuming(saved):
    folder, cls = saved
    assert resume(folder, cls) == 2
    assert sorted(path.name for path in folder.iterdir()) == [
        "last_checkpoint",
        "model_1.pth",
        "model_2.pth",
    ]


@pytest.mark.parametrize("moment", ["in the model", "in the name", "before the rename"])
def test_a_kill_while_saving_leaves_the_previous_checkpoint(saved, moment, monkeypatch):
    """Nothing after the kill runs: the process's remaining writes and clean-up are cut off."""
    folder, cls = saved

    class Killed(BaseException):
        pass

    def cut(*args, **kwargs):
        raise Killed

    if moment == "in the model":
        stock = torch.save

        def half(data, stream):
            stream.write(b"PK\x03\x04 half of a file")
            stream.flush()
            cut()

        monkeypatch.setattr(torch, "save", half)
    elif moment == "in the name":
        monkeypatch.setattr(cls, "tag_last_checkpoint", cut)
    else:
        monkeypatch.setattr(os, "replace", cut)
    monkeypatch.setattr(os, "unlink", lambda path: None)
    with pytest.raises(Killed):
        make(folder, cls, 3.0).save("model_3")
    monkeypatch.undo()
    assert (folder / PART_FILE).exists() == (moment != "in the name")
    assert resume(folder, cls) == 2
    # The same step is saved again, over what was left.
    make(folder, cls, 3.0).save("model_3")
    assert resume(folder, cls) == 3
    assert not (folder / PART_FILE).exists()
    if moment == "in the model":
        assert torch.save is stock


def test_a_kill_while_stock_detectron2_saves_does_not(tmp_path, monkeypatch):
    """That the test above can fail."""
    make(tmp_path, DetectionCheckpointer, 1.0).save("model_final")

    def half(data, stream):
        stream.write(b"PK\x03\x04 half of a file")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", half)
        make(tmp_path, DetectionCheckpointer, 2.0).save("model_final")
    with pytest.raises(Exception, match="zip|PytorchStreamReader|pickle"):
        resume(tmp_path, DetectionCheckpointer)


def test_a_full_disk_is_one_clear_line_and_costs_no_checkpoint(saved):
    folder, cls = saved
    os.symlink("/dev/full", folder / PART_FILE)  # every write to it is ENOSPC
    with pytest.raises(CheckpointError) as caught:
        make(folder, cls, 3.0).save("model_3")
    message = str(caught.value)
    assert "\n" not in message
    assert os.strerror(errno.ENOSPC) in message
    assert "cannot save" in message and "model_3.pth" in message
    assert "--resume" in message and str(folder / "model_2.pth") in message
    assert not (folder / "model_3.pth").exists()
    assert resume(folder, cls) == 2


def test_a_full_disk_at_the_first_checkpoint_names_none(tmp_path):
    os.symlink("/dev/full", tmp_path / PART_FILE)
    with pytest.raises(CheckpointError, match="No space left on device; .* start again"):
        make(tmp_path, value=3.0).save("model_3")
    assert not any(usable_checkpoints(str(tmp_path)))


def test_other_errors_while_saving_are_not_dressed_up(saved, monkeypatch):
    folder, cls = saved
    checkpointer = make(folder, cls, 3.0)

    def state_dict():
        raise RuntimeError("CUDA error")

    checkpointer.checkpointables["trainer"].state_dict = state_dict
    with pytest.raises(RuntimeError, match="CUDA error"):
        checkpointer.save("model_3")


@pytest.mark.parametrize("damage", ["cut short", "emptied", "removed", "overwritten", "untagged"])
def test_a_damaged_last_checkpoint_names_the_previous_one(tmp_path, damage):
    for value in (1, 2):
        make(tmp_path, value=float(value)).save(f"model_{value}")
        os.utime(tmp_path / f"model_{value}.pth", (value, value))
    last, usable = tmp_path / "model_2.pth", tmp_path / "model_1.pth"
    if damage == "cut short":
        os.truncate(last, last.stat().st_size // 2)
    elif damage == "emptied":
        os.truncate(last, 0)
    elif damage == "removed":
        last.unlink()
    elif damage == "overwritten":
        last.write_bytes(b"\0" * 5000)
    else:
        (tmp_path / "last_checkpoint").write_text("")
        usable = last
    with pytest.raises(CheckpointError) as caught:
        resume(tmp_path, WSBCNCheckpointer)
    message = str(caught.value)
    assert message.startswith("cannot resume: ") and "\n" not in message
    assert f"{usable} is whole" in message
    # What it says to do works.
    command = message.partition("to resume from it, ")[2]
    assert command.startswith("echo ")
    assert os.system(command) == 0
    assert resume(tmp_path, WSBCNCheckpointer) == (2 if damage == "untagged" else 1)


def test_weights_alone_are_nothing_to_resume_from(tmp_path):
    """Newer, and whole; but without the trainer's state a resume would begin at iteration 0."""
    for value in (1, 2):
        make(tmp_path, value=float(value)).save(f"model_{value}")
        os.utime(tmp_path / f"model_{value}.pth", (value, value))
    torch.save({"model": make(tmp_path, value=5.0).model.state_dict()}, tmp_path / "weights.pth")
    torch.save({"trainer": {"iteration": 7}}, tmp_path / "trainer.pth")
    (tmp_path / "notes.txt").write_text("newest")
    os.truncate(tmp_path / "model_2.pth", 100)
    with pytest.raises(CheckpointError, match=r"model_1\.pth is whole: to resume from it"):
        resume(tmp_path, WSBCNCheckpointer)
    found = [os.path.basename(path) for path in usable_checkpoints(str(tmp_path))]
    assert found == ["weights.pth", "model_1.pth"]  # newest first


def test_without_any_whole_checkpoint_it_says_so(tmp_path):
    make(tmp_path, value=1.0).save("model_1")
    os.truncate(tmp_path / "model_1.pth", 100)
    with pytest.raises(CheckpointError, match="start again without --resume"):
        resume(tmp_path, WSBCNCheckpointer)


def test_a_whole_checkpoint_of_another_model_is_not_called_damaged(tmp_path):
    make(tmp_path, value=1.0).save("model_1")
    other = WSBCNCheckpointer(nn.Conv2d(1, 1, 1), str(tmp_path), trainer=State(0))
    with pytest.raises(CheckpointError) as caught:
        other.resume_or_load("", resume=True)
    assert "cannot resume" not in str(caught.value)


def test_remote_folders_are_left_to_the_path_manager(tmp_path):
    opened = []

    class Manager:
        def open(self, path, mode="r"):
            opened.append((path, mode))
            return open(tmp_path / "x", mode)

    checkpointer = make(tmp_path, value=1.0)
    checkpointer.path_manager._manager = Manager()
    checkpointer.save_dir = "s3://bucket/run"
    checkpointer.save("model_1")
    assert opened == [
        ("s3://bucket/run/model_1.pth", "wb"),
        ("s3://bucket/run/last_checkpoint", "w"),
    ]


class Custom:
    """An object of somebody's own."""


HOOK_STATES = {
    "arrays": ({"best": np.float64(0.5), "curve": np.arange(3.0), "names": ["a"]}, None),
    "object": ({"best": Custom()}, "test_atomic.Custom"),
    "function": ({"best": len}, "builtins.len"),
    "sparse": ({"best": torch.eye(2).to_sparse()}, "_rebuild_sparse_tensor"),
}


@pytest.mark.parametrize("kind", HOOK_STATES)
def test_what_would_not_be_read_again_is_refused_at_saving(saved, kind):
    folder, cls = saved
    state, refused = HOOK_STATES[kind]

    class Hook(State):
        def state_dict(self):
            return {"iteration": 3, **state}

    checkpointer = cls(nn.Linear(300, 300), str(folder), trainer=Hook(3))
    if refused is None:
        checkpointer.save("model_3")
        assert resume(folder, WSBCNCheckpointer) == 3
        return
    with pytest.raises(CheckpointError, match=refused) as caught:
        checkpointer.save("model_3")
    assert "cannot save" in str(caught.value) and "\n" not in str(caught.value)
    assert not (folder / "model_3.pth").exists() and not (folder / PART_FILE).exists()
    assert resume(folder, cls) == 2


def test_objects_are_an_error_while_resuming_alone(tmp_path):
    """Afterwards, and after a resume that failed, weights are loaded as ever."""
    checkpointer = make(tmp_path, value=1.0)
    checkpointer.save("model_1")
    torch.save({"model": checkpointer.model.state_dict(), "x": Custom()}, tmp_path / "foreign.pth")
    checkpointer.resume_or_load("", resume=True)
    checkpointer.load(str(tmp_path / "foreign.pth"))
    (tmp_path / "last_checkpoint").write_text("foreign.pth")
    with pytest.raises(CheckpointError, match="cannot resume: .*Custom"):
        checkpointer.resume_or_load("", resume=True)
    checkpointer.load(str(tmp_path / "foreign.pth"))
    checkpointer.resume_or_load(str(tmp_path / "foreign.pth"), resume=False)


@pytest.mark.parametrize("kind", ["object", "function"])
def test_a_whole_file_that_is_not_admitted_is_not_called_damaged(tmp_path, kind):
    """As another program, or torch.save, wrote it."""
    state, name = HOOK_STATES[kind]
    model = nn.Linear(300, 300)
    torch.save({"model": model.state_dict(), "trainer": state}, tmp_path / "model_1.pth")
    (tmp_path / "last_checkpoint").write_text("model_1.pth")
    with pytest.raises(CheckpointError, match=name) as caught:
        resume(tmp_path, WSBCNCheckpointer)
    message = str(caught.value)
    assert message.startswith("cannot resume: ") and "\n" not in message
    assert "the file is whole" in message and "damaged" not in message
    make(tmp_path, value=0.0).save("model_0")
    (tmp_path / "last_checkpoint").write_text("model_1.pth")
    with pytest.raises(CheckpointError, match="model_0.pth is whole: to resume from it"):
        resume(tmp_path, WSBCNCheckpointer)
