"""tools/benchmark.py: what it times, counts and divides is what it says."""

import argparse
import json
import sys

import pytest
import reference
import torch
from conftest import ROOT, TINY
from torch import nn
from torch.testing import assert_close

sys.path.insert(0, str(ROOT / "tools"))

import benchmark
from benchmarks import layers, runner, steps

from wsbcn_d2 import BatchChannelNorm2d, WSConv2d, standardize_weight
from wsbcn_d2.engine import load_config


def options(**changes):
    values = {"device": "cpu", "cpu_time": False, "amp": False, "warmup": 1, "rounds": 3}
    return argparse.Namespace(**{**values, **changes})


def test_rounds_are_interleaved_and_warm_ups_do_not_count():
    run, order, now = runner.Runner(options(warmup=2, rounds=3)), [], [0.0]

    def taking(name, seconds):
        def call():
            order.append(name)
            now[0] += seconds * (len(order) > 4) or 100  # warm-ups take long

        return call

    run.clock = lambda: now[0]
    times = run.rounds({"a": taking("a", 2.0), "b": taking("b", 5.0)})
    assert order == ["a", "b"] * 5
    assert times["a"].times == [2.0] * 3 and times["b"].times == [5.0] * 3
    assert runner.milliseconds(times["b"]) == 5000
    assert runner.ratio(times["b"], times["a"]) == {"ratio": 2.5, "spread": 0.0}


def test_ratios_are_taken_within_a_round():
    slow, quick = (runner.measurement("", v) for v in ([1.0, 20.0, 3.0], [1.0, 10.0, 1.0]))
    # 1, 2, 3: the median is 2, the quartiles are 1.5 and 2.5.
    assert runner.ratio(slow, quick) == {"ratio": 2.0, "spread": 0.5}


def test_mixed_precision_is_bfloat16_here_and_off_unless_asked_for():
    for amp, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with runner.Runner(options(amp=amp)).autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_memory_is_the_peak_and_what_is_alive_halfway():
    def run():
        kept = torch.zeros(2 * 2**20)
        more = torch.zeros(2**20)
        del more
        runner.halfway()
        other = torch.zeros(2**18)
        del other, kept

    found = runner.Runner(options()).memory(run)
    assert (found["peak"], found["kept"]) == (12 * 2**20, 8 * 2**20)
    assert found["process"] >= 0


def test_shapes_of_r50_fpn():
    assert layers.r50_fpn_shapes(800, 1216) == [
        (64, 400, 608),
        *((64, 200, 304), (256, 200, 304)),
        *((128, 100, 152), (512, 100, 152), (256, 100, 152)),
        *((256, 50, 76), (1024, 50, 76)),
        *((512, 25, 38), (2048, 25, 38), (256, 25, 38)),
    ]


def test_the_released_forms_compute_what_the_formulas_say():
    torch.manual_seed(1)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.double)
    expected = reference.standardize_weight(weight, "unbiased_std", 1e-5)
    assert_close(layers.five_ops(weight), expected)
    assert_close(standardize_weight(weight, formula="unbiased_std"), expected)
    x = torch.randn(2, 8, 5, 6, dtype=torch.double)
    norm = layers.ReleasedBCN(8, 4, rate=0.25).double()
    mean, var = torch.zeros(8, dtype=torch.double), torch.ones(8, dtype=torch.double)
    ones, zeros = torch.ones(8), torch.zeros(8)
    for _ in range(2):
        y = norm(x)
        mean, var = reference.update(mean, var, x, 0.25, first=False)
        z = reference.batch_affine(x, mean, var, ones, zeros, 1e-5)
        assert_close(y, reference.channel_norm(z, 4, ones, zeros, 1e-5))
    assert_close((norm.mean.flatten(), norm.var.flatten()), (mean, var))


def test_bytes_that_a_layer_keeps():
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    kept = layers.saved_bytes(nn.GroupNorm(4, 8), x)
    # The input, mean and deviation of two samples of four groups, the weight.
    assert kept == 4 * (x.numel() + 2 * 8 + 8)
    assert kept < layers.saved_bytes(BatchChannelNorm2d(8, 4), x) < 1.5 * kept


def test_what_is_kept_twice_is_counted_once():
    class Cube(nn.Module):
        def forward(self, x):
            return x * x * x

    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    assert layers.saved_bytes(Cube(), x) == 4 * 2 * x.numel()  # x, and its square


def test_every_step_draws_the_same_boxes_and_learns_nothing():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.drawn = nn.Parameter(torch.ones(3)), []

        def forward(self, batch):
            self.drawn.append(torch.rand(3))
            return {"a": (self.weight * self.drawn[-1]).sum(), "b": self.weight.sum()}

    cfg = load_config(str(ROOT / "configs/shapes/mask_rcnn_R_18_FPN_gn.yaml"), TINY)
    model = Model()
    step = steps.training(cfg, model, options(image_size=(32, 32)), 1)
    for _ in range(3):
        step()
    assert len(model.drawn) == 3 and all(torch.equal(x, model.drawn[0]) for x in model.drawn)
    assert model.weight.grad is None  # its memory is given back
    assert_close(model.weight.detach(), torch.ones(3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("words, threads", [(["--cpu-time"], 1), (["--threads", "2"], 2), ([], 3)])
def test_time_of_one_thread_is_taken_on_one_thread(words, threads, monkeypatch, capsys):
    found = []

    def mode(runner, args):
        found.append((torch.get_num_threads(), torch.rand(())))
        return {}

    torch.set_num_threads(3)
    monkeypatch.setitem(benchmark.MODES, "ws", mode)
    assert benchmark.main(["ws", *words]) == 0
    torch.manual_seed(0)
    assert found == [(threads, torch.rand(()))]
    assert f"threads={threads}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--channels-last"], ["--released"]])
def test_layers_and_weights(flags, tmp_path, capsys):
    output = tmp_path / "layer.json"
    size = ["--image-size", "64", "64", "--rounds", "1", "--warmup", "0"]
    assert benchmark.main(["layer", *size, *flags, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["command"][:2] == ["tools/benchmark.py", "layer"] and found["hardware"]["torch"]
    assert [row["shape"] for row in found["rows"]] == [
        [1, *shape] for shape in layers.r50_fpn_shapes(64, 64)
    ]
    compared = ["bcn / gn fwd", "bcn / gn", "bcn / bn"] + ["released / bcn"] * (
        "--released" in flags
    )
    for row in found["rows"]:
        assert [key for key in row if " / " in key] == compared
        for key in compared:
            above, below = key.removesuffix(" fwd").split(" / ")
            fwd = " fwd" * key.endswith("fwd")
            assert row[key]["ratio"] == pytest.approx(
                row["ms"][above + fwd] / row["ms"][below + fwd]
            )
    total = [sum(row["ms"][name] for row in found["rows"]) for name in ("bcn", "gn")]
    summary = found["summary"]
    assert summary["bcn / gn, sum of times"] == pytest.approx(total[0] / total[1])
    assert summary["bytes (largest)"] == max(row["bytes"] for row in found["rows"])
    assert set(compared) <= set(summary)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + len(found["rows"]) and lines[2].startswith("1x64x32x32 ")


def test_modes_refuse_what_they_cannot_do(capsys):
    for argv, message in (
        (["step", "a.yaml"], "two or more configs"),
        (["monitor"], "needs a config"),
        (["layer", "--rounds", "0"], "--rounds must be at least 1"),
        (["layer", "--warmup", "-1"], "--warmup at least 0"),
        (["layer", "--device", "cuda", "--cpu-time"], "--cpu-time is for"),
    ):
        with pytest.raises(SystemExit):
            benchmark.parse(argv)
        assert message in capsys.readouterr().err
    assert benchmark.parse(["step", "a.yaml", "--recompute", "x", "y"]).recompute == [["x", "y"]]
    usual = vars(benchmark.parse(["layer"]))
    assert usual == {
        **{"mode": "layer", "configs": [], "device": "cpu", "images": [1], "recompute": []},
        **{"rounds": 15, "warmup": 3, "image_size": (800, 1216), "threads": None, "output": None},
        **dict.fromkeys(("amp", "channels_last", "cpu_time", "released", "quick"), False),
    }
    quick = benchmark.parse(["layer", "--quick"])
    assert (quick.rounds, quick.warmup, quick.image_size) == (1, 0, (96, 128))


def test_batches_of_noise():
    train, again = (steps.random_batch(2, 40, 60, 5, train=True) for _ in range(2))
    assert len(train) == 2 and torch.equal(train[1]["image"], again[1]["image"])
    assert not torch.equal(train[0]["image"], train[1]["image"])
    for item in train:
        truth = item["instances"]
        assert item["image"].shape == (3, 40, 60) and len(truth) == 7
        assert (item["height"], item["width"]) == truth.image_size == (40, 60)
        boxes = truth.gt_boxes.tensor
        assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes[:, [2]] <= 60).all()
        assert (boxes[:, 3] <= 40).all() and set(truth.gt_classes.tolist()) <= set(range(5))
        x0, y0, x1, y1 = boxes.int().unbind(1)
        assert truth.gt_masks.tensor.sum((1, 2)).tolist() == ((x1 - x0) * (y1 - y0)).tolist()
    assert "instances" not in steps.random_batch(1, 40, 60, 5, train=False)[0]


@pytest.mark.slow
def test_steps_and_the_monitor(tmp_path, capsys):
    paths = [tmp_path / f"{name}.yaml" for name in ("gn", "bcn_ws")]
    for path in paths:
        cfg = load_config(str(ROOT / f"configs/shapes/mask_rcnn_R_18_FPN_{path.name}"), TINY)
        path.write_text(cfg.dump())
    output = tmp_path / "step.json"
    quick = ["--quick", "--output", str(output)]
    assert benchmark.main(["step", *map(str, paths), *quick]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [(row["what"], row["name"]) for row in rows] == [
        *(("train", "gn"), ("train", "bcn_ws")),
        *(("infer", "gn"), ("infer", "bcn_ws"), ("infer", "bcn_ws folded")),
    ]
    for row in rows:
        base = rows[0] if row["what"] == "train" else rows[2]
        assert row["time"]["ratio"] == pytest.approx(row["ms"] / base["ms"])
        assert row["peak"] == row["peak bytes"] / base["peak bytes"]
        assert (row["kept bytes"] > 0) == (row["what"] == "train")
    recomputed = ["--recompute", "backbone.bottom_up.res?.*"]
    assert benchmark.main(["step", str(paths[1]), *quick, *recomputed]) == 0
    plain, less = json.loads(output.read_text())["rows"]
    assert less["name"] == "bcn_ws, recomputed backbone.bottom_up.res?.*"
    assert less["kept bytes"] < 0.8 * plain["kept bytes"]
    assert benchmark.main(["monitor", str(paths[1]), *quick]) == 0
    (row,) = json.loads(output.read_text())["rows"]
    assert row["share"] == pytest.approx((row["time"]["ratio"] - 1) * 8 / 100)


def measured(**seconds):
    return {name: runner.measurement(name, [s, s]) for name, s in seconds.items()}


@pytest.mark.parametrize("kept", [40, 0])
def test_a_row_is_compared_with_the_first(kept, capsys):
    """Times, peaks and what is kept, each in units of the base's; 0 kept is no unit."""
    sizes = {"a": (100, kept, 7), "b": (150, 60, 9)}

    class Fake:
        def memory(self, run):
            return dict(zip(("peak", "kept", "process"), sizes[run], strict=True))

    rows = steps._report(Fake(), "train", 2, {"a": "a", "b": "b"}, measured(a=0.5, b=0.75))
    assert rows[1] == {
        **{"what": "train", "images": 2, "name": "b", "ms": 750.0, "peak": 1.5},
        **{"time": {"ratio": 1.5, "spread": 0.0}, "kept": 60 / kept if kept else 0.0},
        **{"peak bytes": 150, "kept bytes": 60, "process bytes": 9},
    }
    assert (rows[0]["peak"], rows[0]["kept"]) == (1.0, 1.0 if kept else 0.0)
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("train  2 image(s)  time 1.000+-0.000  peak 1.000  kept ")
    assert first.endswith("(500 ms, peak 0 MiB, kept 0 MiB, process 0 MiB)  a")


def test_a_watched_window_is_one_of_eight_steps():
    seen = []

    class Hook:
        trainer = argparse.Namespace(iter=None)

        def before_step(self):
            seen.append(("before", self.trainer.iter))

        def after_step(self):
            seen.append(("after", self.trainer.iter))

    steps._window(lambda: seen.append("step"), Hook())()
    assert seen == [x for i in range(8) for x in (("before", i), "step", ("after", i))]
    assert (steps.PERIOD, steps.WINDOW) == (100, 8)  # tools/compare.py's, the monitor's own


def test_every_model_does_the_same_work_on_noise(monkeypatch):
    asked = []
    monkeypatch.setattr(steps, "load_config", lambda *a: asked.append(a) or "cfg")
    monkeypatch.setattr(steps, "build_model", lambda cfg: "model")
    assert steps.load("a.yaml", "cuda") == ("cfg", "model")
    assert asked == [
        (
            "a.yaml",
            [
                *("MODEL.DEVICE", "cuda", "MODEL.WEIGHTS", "", "INPUT.MASK_FORMAT", "bitmask"),
                *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
            ],
        )
    ]


@pytest.mark.parametrize("quick, count", [(False, 5), (True, 3)])
@pytest.mark.parametrize("last", [False, True])
def test_which_weights_are_standardized_by_what(quick, count, last, monkeypatch, capsys):
    """Each way computes what it is called, on all weights; the ratios are to the default's."""
    model = nn.Sequential(nn.Conv2d(2, 2, 3), *[WSConv2d(2, 4, 3, bias=False) for _ in range(5)])
    asked, seen = [], []
    monkeypatch.setattr(layers, "load_config", lambda *a: asked.append(a) or "cfg")
    monkeypatch.setattr(layers, "build_model", lambda cfg: model)

    def rounds(runs):
        stock = torch.Tensor.backward
        for name, run in runs.items():
            seen.append((name, []))
            with monkeypatch.context() as patch:
                patch.setattr(
                    torch.Tensor, "backward", lambda y, dy: (seen[-1][1].append(y), stock(y, dy))
                )
                run()
        seconds = dict(zip(runs, (0.2, 0.1, 0.3, 0.8, 0.05), strict=True))
        return {name: runner.measurement(name, [s, s]) for name, s in seconds.items()}

    args = argparse.Namespace(configs=["own.yaml"], device="cpu", quick=quick, channels_last=last)
    found = layers.ws_mode(argparse.Namespace(rounds=rounds), args)
    assert asked == [("own.yaml", ["MODEL.DEVICE", "cpu"])]
    names = ["unbiased", "biased", "unbiased_std", "five-op formula", "copy"]
    assert [name for name, _ in seen] == [row["name"] for row in found["rows"]] == names
    for name, outputs in seen:
        assert len(outputs) == count
        for conv, y in zip(model[1:], outputs, strict=False):
            formula = "unbiased_std" if name.startswith("five") else name
            weight = conv.weight.detach()
            expected = weight if name == "copy" else standardize_weight(weight, formula=formula)
            assert_close(y.detach(), expected)
            assert y.is_contiguous(memory_format=torch.channels_last) == last or name[:4] == "five"
    ratios = [row["time / ours"]["ratio"] for row in found["rows"]]
    assert ratios == pytest.approx([1, 0.5, 1.5, 4, 0.25])
    assert [row["ms"] for row in found["rows"]] == pytest.approx([200, 100, 300, 800, 50])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{count} weights, 0.0 M numbers; ratios: time / ours, fwd+bwd"
    args.configs = []
    layers.ws_mode(argparse.Namespace(rounds=rounds), args)
    config = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_2x_gn_ws_1img.yaml"
    assert asked[1][0] == str(ROOT / "configs" / config)
