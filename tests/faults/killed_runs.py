"""Trains with tools/train_net.py, kills it with SIGKILL, resumes it; prints what happened as JSON.

    python killed_runs.py FOLDER TRIALS SEED

Every run is a fork of this process, which has imported everything and computed nothing. Data and
random numbers are a function of the iteration, as the data order of Detectron2's own loader is
not after a resume, so that an interrupted run can be compared with an uninterrupted one.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase

from wsbcn_d2 import data
from wsbcn_d2.checkpoint import CheckpointError
from wsbcn_d2.checkpoint.files.opening import read_file
from wsbcn_d2.engine import trainer
from wsbcn_d2.files import PART_FILE

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from conftest import TINY  # noqa: E402

MAX_ITER = 40  # ten trials of at most four steps do not get there, on any machine
RATE = 0.02


def load_train_net():
    spec = importlib.util.spec_from_file_location("train_net", ROOT / "tools" / "train_net.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train_net = load_train_net()


def digest(state):
    """One hash of a state dict."""
    result = hashlib.sha256()
    for name in sorted(state):
        result.update(name.encode())
        result.update(state[name].detach().contiguous().numpy().tobytes())
    return result.hexdigest()


class ByIteration:
    """A data loader: the batch of an iteration is always the same one."""

    def __init__(self, trainer, batches):
        self.trainer, self.batches = trainer, batches

    def __iter__(self):
        while True:
            yield self.batches[self.trainer.iter % len(self.batches)]


class Journal(HookBase):
    """Seeds each step and writes down how the run started and what each step used."""

    def __init__(self, path):
        self.path = path

    def write(self, **row):
        with open(self.path, "a") as stream:
            stream.write(json.dumps(row) + "\n")

    def before_train(self):
        trainer = self.trainer
        self.write(
            start=trainer.start_iter,
            model=digest(trainer.model.state_dict()),
            momentum=len(trainer.optimizer.state_dict()["state"]),
        )

    def before_step(self):
        torch.manual_seed(1000 + self.trainer.iter)

    def after_step(self):
        latest = self.trainer.storage.latest()
        self.write(
            iteration=self.trainer.iter,
            rate=latest["bcn_update_rate"][0],
            loss=latest["total_loss"][0],
        )


class FixedOrderTrainer(trainer.Trainer):
    """The project's trainer on data and random numbers that the iteration decides."""

    def __init__(self, cfg):
        super().__init__(cfg)
        # Last but for the writers: the learning rate's hook has run, the checkpoint's has not.
        self.register_hooks([Journal(os.path.join(cfg.OUTPUT_DIR, "journal.jsonl"))])
        loader = self._trainer.data_loader
        torch.manual_seed(0)
        stream = iter(loader)
        fixed = ByIteration(self, [next(stream) for _ in range(3)])
        self._trainer.data_loader = fixed
        attribute = "_data_loader_iter_obj"  # Detectron2 main makes it when it is first needed
        if not hasattr(self._trainer, attribute):
            attribute = "_data_loader_iter"
        setattr(self._trainer, attribute, iter(fixed))


def options(output):
    return [
        *TINY,
        *("OUTPUT_DIR", str(output), "SEED", "7"),
        *("DATASETS.TRAIN", "('killed_runs',)", "DATASETS.TEST", "()"),
        *("MODEL.BCN.UPDATE_RATE", str(RATE), "MODEL.BCN.UPDATE_RATE_SCHEDULE", "lr"),
        *("SOLVER.BASE_LR", "0.01", "SOLVER.WARMUP_ITERS", "12", "SOLVER.STEPS", "(25,)"),
        *("SOLVER.MAX_ITER", str(MAX_ITER), "SOLVER.CHECKPOINT_PERIOD", "2"),
        *("SOLVER.IMS_PER_BATCH", "1", "TEST.EVAL_PERIOD", "0"),
    ]


class Dying:
    """A file whose writer is killed by SIGKILL when it has written so many bytes."""

    def __init__(self, stream, left):
        self.stream, self.left = stream, left

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, data):
        data = memoryview(data).cast("B")
        if len(data) >= self.left:
            self.stream.write(data[: self.left])
            self.stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= len(data)
        return self.stream.write(data)


def die_in_a_write(saves, size):
    """Lets this process write so many checkpoints, and of the next one so many bytes."""
    stock, remaining = torch.save, iter(range(saves))

    def save(data, stream, **options):
        whole = next(remaining, None) is not None
        stock(data, stream if whole else Dying(stream, size), **options)

    torch.save = save


def start(output, resume, *more, die=None):
    """Forks a run; returns its process id. ``die`` is what :func:`die_in_a_write` takes."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        random.seed(0)
        if die:
            die_in_a_write(*die)
        log = os.open(f"{output}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        trainer.Trainer = FixedOrderTrainer
        config = str(ROOT / "configs" / "shapes" / "mask_rcnn_R_18_FPN_bcn_ws.yaml")
        sys.argv = ["train_net.py", "--config-file", config, *(["--resume"] if resume else [])]
        sys.argv += [*options(output), *more]
        code = train_net.cli()
    finally:
        os._exit(code)


def journal(output):
    lines = (Path(output) / "journal.jsonl").read_text().splitlines()
    rows = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def starts(output):
    with contextlib.suppress(FileNotFoundError):
        return [row for row in journal(output) if "start" in row]
    return []


def steps_of_last_run(output):
    rows = journal(output)
    return len(rows) - 1 - max(i for i, row in enumerate(rows) if "start" in row)


def writing_since(output, moment):
    """Whether a file is half written, and not by an earlier run that was killed."""
    with contextlib.suppress(FileNotFoundError):
        return (output / PART_FILE).stat().st_mtime > moment
    return False


def prune(output):
    """Keeps the disk small: saving all the time is the point, keeping it all is not."""
    for path in sorted(Path(output).glob("model_0*.pth"))[:-3]:
        path.unlink()


def finish(pid):
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def last_checkpoint(output):
    """(name, model hash, iteration) of the checkpoint that --resume takes; None without one."""
    tag = Path(output) / "last_checkpoint"
    if not tag.exists():
        return None
    name = tag.read_text()
    content = read_file(str(Path(output) / name))[0]
    return name, digest(content["model"]), content["trainer"]["iteration"]


def readable(path):
    """Whether a file is a whole checkpoint."""
    try:
        return bool(read_file(str(path)))
    except CheckpointError:
        return False


def main():
    folder, trials, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    data.register_shapes_split("killed_runs", folder, num_images=3, image_size=(64, 64))
    DatasetCatalog.get("killed_runs")
    randomness = random.Random(seed)
    output, straight = folder / "killed", folder / "straight"
    report = {"trials": []}
    began = time.monotonic()
    while len(report["trials"]) < trials:
        expected = last_checkpoint(output)
        before, now = len(starts(output)), time.time()
        trial = {"expected": expected, "die": None}
        if randomness.random() < 0.5:  # inside a write, which is the dangerous moment
            share, whole = randomness.uniform(0.05, 0.95), 10**6  # it has more
            if expected is not None:
                whole = (output / expected[0]).stat().st_size
            trial["die"] = randomness.randint(0, 1), int(whole * share)
            trial["whole"] = whole
        pid = start(output, expected is not None, die=trial["die"])
        deadline = time.monotonic() + 300
        while len(starts(output)) == before:
            if os.waitpid(pid, os.WNOHANG)[0] or time.monotonic() > deadline:
                sys.exit(f"the run did not start, see {output}.log")
            time.sleep(0.01)
        if trial["die"] is None:
            steps = randomness.randint(0, 3)
            while steps_of_last_run(output) < steps and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(randomness.uniform(0.0, 0.3))
            os.kill(pid, signal.SIGKILL)
        trial["exit"] = finish(pid)
        trial["in_write"] = writing_since(output, now)
        if trial["in_write"]:
            trial["written"] = (output / PART_FILE).stat().st_size
            trial["readable"] = readable(output / PART_FILE)
        began_at = starts(output)[before:]
        trial["started"] = began_at[0] if began_at else None
        trial["done"] = max(
            (row["iteration"] for row in journal(output) if "iteration" in row), default=None
        )
        report["trials"].append(trial)
        prune(output)
    report["kill_seconds"] = time.monotonic() - began
    rarely = ("SOLVER.CHECKPOINT_PERIOD", str(10 * MAX_ITER))
    report["exit_resumed"] = finish(start(output, True, *rarely))
    report["exit_straight"] = finish(start(straight, False, *rarely))
    report["left"] = sorted(path.name for path in output.glob(".*"))
    for name, path in (("resumed", output), ("straight", straight)):
        content = read_file(str(path / "model_final.pth"))[0]
        momentum = content["trainer"]["_trainer"]["optimizer"]["state"]
        report[name] = {
            "model": digest(content["model"]),
            "momentum": digest({str(k): v["momentum_buffer"] for k, v in momentum.items()}),
            "iteration": content["trainer"]["iteration"],
            "rates": {row["iteration"]: row["rate"] for row in journal(path) if "rate" in row},
            "losses": {row["iteration"]: row["loss"] for row in journal(path) if "loss" in row},
        }
    report["seconds"] = time.monotonic() - began
    print(json.dumps(report))


if __name__ == "__main__":
    main()
