"""What tools/gpu_check.sh does on a GPU, done in the interpreter on small sizes."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[4] / "tools" / "benchmarks"))

import gpu_checks
import gpu_report

from wsbcn_d2.layers.kernels import triton_bcn, triton_ws


def test_kernels():
    found = gpu_checks.bcn_kernels("cpu", gpu_checks.SMALL)
    assert [part.split()[0] for part in found.split(", ")] == [
        str(dtype).removeprefix("torch.") for dtype in gpu_checks.LIMITS
    ]
    found = gpu_checks.ws_kernels("cpu", gpu_checks.SMALL_WEIGHTS)
    assert len(found.split(", ")) == 4


@pytest.mark.parametrize(
    "options",
    [{}, {"layout": torch.channels_last}, {"amp": torch.float16}, {"amp": torch.bfloat16}],
)
def test_training(options):
    found = gpu_checks.training("cpu", steps=2, width=8, size=9, **options)
    assert found.startswith("2 steps, gradients within ")


def test_long_offsets():
    assert gpu_checks.long_offsets("cpu", (2, 32, 4, 4)) == "same"


def wrong(passes, factor):
    def run(*args):
        first, *rest = passes(*args)
        return first * factor, *rest

    return run


def test_a_kernel_that_is_wrong_is_found(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(triton_bcn, "bcn_forward", wrong(triton_bcn.bcn_forward, 1.01))
        with pytest.raises(AssertionError, match="error 1.0e-02, allowed"):
            gpu_checks.bcn_kernels("cpu", gpu_checks.SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(triton_bcn, "bcn_backward", wrong(triton_bcn.bcn_backward, 1.05))
        with pytest.raises(AssertionError, match="step 0, gradients"):
            gpu_checks.training("cpu", steps=1, width=8, size=9)
    with monkeypatch.context() as patch:
        patch.setattr(triton_ws, "ws_forward", wrong(triton_ws.ws_forward, 1.01))
        with pytest.raises(AssertionError, match=r"\(4, 3, 3, 3\) biased"):
            gpu_checks.ws_kernels("cpu", gpu_checks.SMALL_WEIGHTS)
    with monkeypatch.context() as patch:
        patch.setattr(triton_bcn, "takes_bcn", lambda *args: False)
        with pytest.raises(AssertionError, match="no kernels"):
            gpu_checks.bcn_kernels("cpu", gpu_checks.SMALL)


# A few times what rounding explains, for each type.
TOO_MUCH = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 0.2, torch.float64: 1e-9}


@pytest.mark.parametrize("dtype", gpu_checks.LIMITS)
def test_each_type_has_a_limit_of_its_own(dtype, monkeypatch):
    monkeypatch.setattr(gpu_checks, "LIMITS", {dtype: gpu_checks.LIMITS[dtype]})
    factor = 1 + TOO_MUCH[dtype]
    monkeypatch.setattr(triton_bcn, "bcn_forward", wrong(triton_bcn.bcn_forward, factor))
    with pytest.raises(AssertionError, match="allowed"):
        gpu_checks.bcn_kernels("cpu", gpu_checks.SMALL[:1])


@pytest.mark.parametrize("amp", gpu_checks.GRADIENT_LIMITS)
def test_gradients_that_are_twice_too_large_are_found(amp, monkeypatch):
    monkeypatch.setattr(triton_bcn, "bcn_backward", wrong(triton_bcn.bcn_backward, 2))
    with pytest.raises(AssertionError, match="step 0, gradients"):
        gpu_checks.training("cpu", steps=1, width=8, size=9, amp=amp)


def test_what_is_checked_and_how_closely():
    assert {
        torch.float32: 5e-4,
        torch.float16: 5e-3,
        torch.bfloat16: 4e-2,
        torch.float64: 1e-10,
    } == gpu_checks.LIMITS
    assert {None: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.4} == gpu_checks.GRADIENT_LIMITS
    shapes = {(n, c): (h * w, groups) for n, c, h, w, groups in gpu_checks.SHAPES}
    assert shapes == {
        (1, 64): (400 * 608, 32),
        (2, 256): (100 * 152, 32),
        (2, 2048): (25 * 38, 32),
        (512, 256): (49, 32),
        (100, 256): (196, 32),
        (3, 64): (1, 32),
        (1, 512): (13 * 19, 1),
        (2000, 32): (9, 4),
    }
    weights = [(64, 3, 7, 7), (256, 64, 1, 1), (512, 512, 3, 3), (64, 2048, 3, 3)]
    assert weights == gpu_checks.WEIGHTS
    checks = list(gpu_checks.CHECKS)
    assert all(name.startswith("BCN against float64, ") for name in checks[: len(shapes)])
    assert checks[len(shapes) :] == [
        "WS against float64",
        "training, float32",
        "training, channels_last",
        "training, AMP float16",
        "training, AMP bfloat16",
        "waiting for the GPU",
        "tensors beyond 2^31 elements",
        "a GPU that is not the current one",
    ]


def test_what_each_check_passes_on(monkeypatch):
    calls = []
    for name in ("bcn_kernels", "training"):
        monkeypatch.setattr(
            gpu_checks, name, lambda *args, name=name, **options: calls.append((args, options))
        )
    for check, run in gpu_checks.CHECKS.items():
        if check.startswith(("BCN", "training, c", "training, A")):
            run("cuda")
    kernels = [(("cuda", [shape]), i) for i, shape in enumerate(gpu_checks.SHAPES)]
    assert calls[: len(kernels)] == [(a, {"every_type": i % 3 == 0}) for a, i in kernels]
    assert calls[len(kernels) :] == [
        (("cuda",), {"layout": torch.channels_last, "steps": 50}),
        (("cuda", torch.float16), {"steps": 50}),
        (("cuda", torch.bfloat16), {"steps": 50}),
    ]
    norm = torch.empty(36, 256, 500, 500, device="meta")
    assert gpu_checks.long_offsets.__defaults__ == (norm.shape,) and norm.numel() > 2**31


def test_the_page(tmp_path, monkeypatch, capsys):
    def bad(device):
        raise AssertionError("x | y:\nerror 1")

    checks = {"good": lambda d: "fine", "bad": bad, "left": lambda d: "not run: one GPU"}
    monkeypatch.setattr(gpu_report, "CHECKS", checks)
    monkeypatch.setattr(gpu_report, "apart", lambda name, deadline: checks[name]("cuda"))
    monkeypatch.setattr(gpu_report, "about", lambda: ["a card"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    output = tmp_path / "page.md"
    assert gpu_report.main(["--quick", "--output", str(output)]) == 1
    assert output.read_text().splitlines() == [
        "a card",
        "",
        "| check | result | found | seconds |",
        "|---|---|---|---|",
        "| good | ok | fine | 0 |",
        "| bad | FAILED | AssertionError: x / y: error 1 | 0 |",
        "| left | not run | one GPU | 0 |",
    ]
    del checks["bad"]
    assert gpu_report.main(["--quick", "--output", str(output)]) == 0


def test_the_other_programs_of_a_page(tmp_path, monkeypatch):
    """Without --quick: a step on two GPUs, the benchmarks on CUDA, the sanitizer; nothing twice."""
    asked = []

    def command(args, deadline, keep):
        asked.append(args)
        says = "warming up", "x 1.00+-0.01", "ERROR SUMMARY: 0 errors"
        return "; ".join(line for line in says if keep(line)) or "ran"

    monkeypatch.setattr(gpu_report, "command", command)
    monkeypatch.setattr(gpu_report, "all_apart", lambda deadline: [])
    monkeypatch.setattr(gpu_report, "about", lambda: [])
    monkeypatch.setattr(gpu_report.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cudnn, cublas = SimpleNamespace(), SimpleNamespace()
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    monkeypatch.setattr(torch.backends.cuda, "matmul", cublas)
    assert gpu_report.main(["--output", str(tmp_path / "page.md")]) == 0
    assert vars(cudnn) == {"allow_tf32": False, "deterministic": True}
    assert vars(cublas) == {"allow_tf32": False}
    coco = "configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_2x"
    step = ["step", *(f"{coco}_{kind}_1img.yaml" for kind in ("gn", "gn_ws", "bcn_ws"))]
    options = [
        [*step, "--rounds", "25", "--warmup", "8"],
        [*step, "--amp", "--rounds", "25", "--warmup", "8"],
        ["layer", "--rounds", "10"],
        ["layer", "--amp", "--rounds", "10"],
        ["ws", "--rounds", "10"],
    ]
    python, root = sys.executable, gpu_report.ROOT
    training, *benchmarks, sanitizer = asked
    assert training[:4] == [python, "tools/train_net.py", "--num-gpus", "2"]
    assert training[training.index("--config-file") + 1].endswith("_bcn_ws.yaml")
    assert training[training.index("SOLVER.MAX_ITER") + 1] == "2"
    assert all((root / part).is_file() for args in asked for part in args if ".yaml" in part)
    assert benchmarks == [[python, "tools/benchmark.py", *o, "--device", "cuda"] for o in options]
    check = [python, gpu_report.__file__, "--sanitized"]
    assert sanitizer == ["/bin/compute-sanitizer", "--error-exitcode", "9", *check]
    rows = [line.split(" | ") for line in (tmp_path / "page.md").read_text().splitlines()[3:]]
    assert [row[2] for row in rows] == ["ran", *["x 1.00+-0.01"] * 5, "ERROR SUMMARY: 0 errors"]
    assert {row[1] for row in rows} == {"ok"}

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(gpu_report.shutil, "which", lambda name: None)
    assert gpu_report.two_processes(0.0) == "not run: one GPU"
    assert gpu_report.sanitizer(0.0).startswith("not run: compute-sanitizer")


def test_it_takes_at_most_ten_minutes():
    assert gpu_report.LIMIT <= 600


def test_other_programs():
    say = [
        sys.executable,
        "-c",
        "import sys; print('a +- b'); print('c'); sys.exit(int(sys.argv[1]))",
    ]
    later = gpu_report.time.monotonic() + 60
    assert gpu_report.command([*say, "0"], later, lambda line: "+-" in line) == "a +- b"
    with pytest.raises(AssertionError, match="^c$"):
        gpu_report.command([*say, "3"], later, lambda line: True)
    assert "out of time" in gpu_report.command([*say, "0"], later - 59, lambda line: True)


def test_a_check_apart(monkeypatch):
    """Its process finds no GPU here, and says so in its last line."""
    with pytest.raises(AssertionError, match="PyTorch finds no GPU"):
        gpu_report.apart("WS against float64", gpu_report.time.monotonic() + 60)
    monkeypatch.setattr(gpu_report, "CHECKS", {"one": lambda device: f"on {device}"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu_report.main(["--check", "one"]) == 0


def test_without_a_gpu_it_says_so(capsys):
    assert gpu_report.main([]) == 2
    assert capsys.readouterr().err == "gpu_check: PyTorch finds no GPU on this machine\n"
