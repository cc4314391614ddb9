"""Triton's kernels on a machine without a GPU: interpreted, compiled ahead of time, counted."""

import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

# Older ones have an interpreter and a compiler that are used in another way.
pytest.importorskip("triton", "3.4", reason="Triton 3.4 or newer is not installed")

import aot

from wsbcn_d2 import BatchChannelNorm2d, WSConv2d
from wsbcn_d2.layers.kernels import build, cuda_nodes, dispatch, triton_bcn, triton_ws
from wsbcn_d2.layers.kernels import triton_launch as launch

ROOT = Path(__file__).parents[3]
BCN = ["moments", "settle", "apply", "sums", "settle_backward", "combine"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["check_bcn", "check_ws", "check_layers", "check_nodes", "check_gpu_check"]
)
def test_interpreted(name, pytestconfig):
    """The interpreter is chosen before Triton is imported, hence the process."""
    path = ROOT / "tests/layers/kernels/interpreted" / f"{name}.py"
    options = ["--all"] if pytestconfig.option.all else []
    options += [f"--rotation={pytestconfig.option.rotation}", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *options, str(path)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "skipped" not in result.stdout


def bcn_step(shape, layout=torch.contiguous_format, dtype=torch.float32, wide=torch.float32):
    """What a training step launches for one BCN of 32 groups."""
    with torch.device("meta"):
        x = torch.empty(shape, dtype=dtype).contiguous(memory_format=layout)
        w, c = torch.empty(32, dtype=wide), torch.empty(shape[1], dtype=wide)
        count = torch.empty((), dtype=torch.int64)
        y, saved = triton_bcn.bcn_forward(x, w, w, c, c, c, c, count, 1e-5, 0.01, 1e-5, None)
        triton_bcn.bcn_backward(y, x, w, c, c, saved, (True, True))


def ws_step(shape, out=None):
    with torch.device("meta"):
        weight = torch.empty(shape)
        y, _ = triton_ws.ws_forward(weight, "unbiased_std", 1e-5, out)
        triton_ws.ws_backward(y, weight, (), "unbiased_std", 1e-5)


LAST = torch.channels_last
HALF = torch.bfloat16
# Large maps, maps of unaligned rows, RoI maps, channels_last, half precision; filters of 1x1 and
# 3x3 convolutions, and such as exceed the registers. Then bits of the widest access, and the most
# registers of a thread that leave a GPU enough of them in flight.
CASES = {
    "large": (lambda: bcn_step((1, 256, 200, 304)), 128),
    "unaligned": (lambda: bcn_step((2, 2048, 25, 38)), 64),
    "RoI": (lambda: bcn_step((512, 256, 7, 7)), 128),
    "channels_last": (lambda: bcn_step((1, 256, 200, 304), LAST, HALF), 128),
    "1x1": (lambda: ws_step((256, 512, 1, 1)), 128),
    "3x3": (lambda: ws_step((512, 512, 3, 3), torch.float16), 64),
    "5x5": (lambda: ws_step((512, 512, 5, 5)), 128),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_compiled_ahead_of_time(case, target, cache, monkeypatch, record_property):
    run, bits = CASES[case]
    if (case, target) == ("RoI", "gfx942"):
        bits //= 2  # 512 lanes are two for each of four times 64 threads
    calls = aot.recorded(monkeypatch, run)
    assert [call.name for call in calls] in (BCN, ["standardize"] * 2)
    for call in calls:
        compiled = aot.build(call, aot.TARGETS[target])
        found = aot.resources(compiled, aot.TARGETS[target])
        record_property(f"{case} {target} {call.name}", str(found))
        print(case, target, call.name, found)
        assert found.spilled <= 64, call.name  # bytes; ptxas spills a few to save registers
        # One program per group settles: its registers keep no other from running.
        assert found.registers <= (256 if "settle" in call.name else 128), call.name
        if "settle" not in call.name:
            assert found.load >= bits, call.name
            if call.name in ("apply", "combine", "standardize"):
                assert found.store >= bits, call.name
        # What the direct launch passes, in its order.
        assert list(compiled.src.signature) == call.kernel.arg_names
        assert len(compiled.src.signature) == len(call.args) + len(call.constants)


@pytest.mark.parametrize(
    "shape", [(1, 64, 400, 608), (2, 256, 25, 38), (512, 256, 7, 7), (1, 64, 1, 1)]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_launches_and_bytes_of_a_step(shape, layout, dtype, monkeypatch):
    calls = aot.recorded(monkeypatch, lambda: bcn_step(shape, layout, dtype))
    assert [call.name for call in calls] == BCN
    n, c, h, w = shape
    numbers = n * c * h * w
    passes = [
        sum(a.numel() == numbers and a.dtype == dtype for a in call.args if torch.is_tensor(a))
        for call in calls
    ]
    if h * w > 1:  # else rows are as large as x
        assert passes == [1, 0, 2, 2, 0, 3]
    for call in calls:
        tile = call.constants
        if "ROWS" in tile:  # every element belongs to one program
            _, channels, size, chunks, units = call.args[-6 if call.name == "apply" else -5 :][:5]
            assert (channels, size) == (c, h * w)
            if tile["FLAT"]:
                assert units * tile["UNIT"] == tile["ROWS"] * size <= tile["COLS"]
                assert call.programs * tile["ROWS"] == n * c and c % tile["ROWS"] == 0
            else:
                assert units * tile["UNIT"] == (c if tile["LAST"] else size)
                blocks = -(-c // tile["ROWS"])
                assert chunks == -(-size // tile["COLS"])
                assert call.programs == n * blocks * chunks
            assert tile["ROWS"] * tile["COLS"] <= 8192
            assert call.programs < 2**31
        elif call.name.startswith("settle"):
            block = call.constants
            assert block["CG"] * block["NB"] * block["CHUNKS"] <= 4096
            assert call.programs == 32


def test_a_weight_is_standardized_by_one_launch_each_way(monkeypatch):
    for shape in ((256, 64, 1, 1), (512, 512, 3, 3), (64, 3, 7, 7), (8, 2048, 3, 3)):
        calls = aot.recorded(monkeypatch, lambda shape=shape: ws_step(shape, torch.float16))
        assert [call.name for call in calls] == ["standardize"] * 2
        for call in calls:
            assert call.programs * call.constants["ROWS"] >= shape[0]


def test_layers_launch_as_much_as_their_kernels(monkeypatch):
    """Through the modules: a convolution with its norm is 4 launches each way of ours."""
    monkeypatch.setenv("WSBCN_FUSED", "triton")
    with torch.device("meta"):
        conv = WSConv2d(64, 64, 1, bias=False, norm=BatchChannelNorm2d(64))
        x = torch.empty(1, 64, 8, 8, requires_grad=True)

    calls = aot.recorded(monkeypatch, lambda: conv(x).sum().backward())
    assert [call.name for call in calls] == ["standardize", *BCN, "standardize"]
    with torch.no_grad():
        calls = aot.recorded(monkeypatch, lambda: conv.eval()(x))
    assert [call.name for call in calls] == ["standardize", *BCN[:3]]


def test_without_a_gpu_and_interpreter_they_take_nothing(monkeypatch):
    monkeypatch.setenv("WSBCN_FUSED", "triton")
    norm, conv = BatchChannelNorm2d(64), WSConv2d(64, 64, 1)
    assert not launch.INTERPRETED
    assert norm(torch.randn(1, 64, 4, 4)).grad_fn.name() == "NativeGroupNormBackward0"
    assert conv(torch.randn(1, 64, 4, 4)).isfinite().all()


@pytest.mark.parametrize("case", ["works", "no compiler", "no Triton"])
def test_a_triton_that_cannot_launch_is_said_once(monkeypatch, caplog, case):
    class Nothing:
        def __getitem__(self, grid):
            if case == "no compiler":
                raise RuntimeError("Failed to find C compiler.\nSet CC.")
            return lambda: None

    monkeypatch.setenv("WSBCN_FUSED", "triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launch, "_nothing", Nothing())
    monkeypatch.setattr(launch, "on_gpu", lambda x: True)
    if case == "no Triton":
        monkeypatch.setitem(sys.modules, "triton", None)
    for cached in (dispatch._triton, dispatch._triton_works):
        cached.cache_clear()
    weight = torch.randn(2, 3, 1, 1)
    norm = BatchChannelNorm2d(8, 4)
    tensors = norm.weight, norm.bias, norm.bn.weight, norm.bn.bias
    moving = norm.bn.running_mean, norm.bn.running_var, norm.bn.num_batches_tracked
    with caplog.at_level(logging.WARNING, logger="wsbcn_d2.layers.kernels"):
        found = dispatch.bcn_backend(torch.randn(1, 8, 2, 2), *tensors, *moving)
        assert dispatch.ws_backend(weight) is (None if case != "works" else triton_ws)
    assert found is (None if case != "works" else triton_bcn)
    said = [r.getMessage() for r in caplog.records]
    if case == "works":
        assert said == []
    else:
        (message,) = said
        reason = {"no compiler": "RuntimeError: Failed to find C compiler.", "no Triton": "triton"}
        assert "the readable forms serve instead" in message and reason[case] in message
    for cached in (dispatch._triton, dispatch._triton_works):
        cached.cache_clear()


class Kernel:
    """Stands for a compiled kernel and for Triton's way of launching it."""

    def __init__(self, parameters):
        self.calls, self.direct = [], []
        self.made = SimpleNamespace(
            src=SimpleNamespace(signature=dict.fromkeys(range(parameters))),
            function="function", packed_metadata="metadata",
            run=lambda *args: self.direct.append(args),
        )  # fmt: skip

    def __getitem__(self, grid):
        def call(*args, **options):
            self.calls.append((grid, args, options))
            return self.made

        return call


def test_the_second_launch_is_direct():
    kernel = Kernel(5)
    run = launch.Launch(kernel, 7, ("kind",), (3, 4), 8, EPS=0.5)
    run(11, "x", None)
    assert kernel.calls == [((7,), ("x", None, 3, 4), {"EPS": 0.5, "num_warps": 8})]
    run(11, "y", None)
    expected = (7, 1, 1, 11, "function", "metadata", None, None, None, "y", None, 3, 4, 0.5)
    assert kernel.direct == [expected] and len(kernel.calls) == 1
    # Another size of the same kind needs nothing compiled; unaligned addresses go Triton's way.
    other = launch.Launch(kernel, 9, ("kind",), (5, 6), 8, EPS=0.5)
    other(11, "z", None)
    assert kernel.direct[1][0] == 9 and kernel.direct[1][-3:] == (5, 6, 0.5)
    other(None, "z", None)
    assert len(kernel.direct) == 2 and len(kernel.calls) == 2
    # An unaligned first call must not be what later ones repeat.
    third = launch.Launch(kernel, 9, ("another kind",), (5, 6), 8, EPS=0.5)
    third(None, "z", None)
    third(11, "z", None)
    assert len(kernel.direct) == 2 and len(kernel.calls) == 4


@pytest.mark.parametrize("parameters", [4, None])
def test_a_triton_of_other_internals_is_launched_its_own_way(parameters):
    """Before 3.3 constants are no arguments; what a later one may lack is not known."""
    kernel = Kernel(parameters or 0)
    if parameters is None:
        del kernel.made.packed_metadata, kernel.made.src
    run = launch.Launch(kernel, 7, ("kind",), (3, 4), 8, EPS=0.5)
    for _ in range(3):
        run(11, "x", None)
    assert len(kernel.calls) == 3 and not kernel.direct


def test_unaligned_addresses_are_seen(monkeypatch):
    monkeypatch.setattr(launch, "on_gpu", lambda x: True)
    monkeypatch.setattr(launch, "_raw_stream", lambda device: 5)
    aligned = torch.empty(64)
    assert launch.stream_of(aligned) == launch.stream_of(aligned, aligned[4:]) == 5
    assert launch.stream_of(aligned[1:]) is launch.stream_of(aligned, aligned[2:]) is None
    large = torch.empty(2**30, dtype=torch.uint8, device="meta")
    assert launch.stream_of(large[:64]) == 5
    monkeypatch.setattr(launch, "_SIZE_COUNTS", True)  # on AMD
    assert launch.stream_of(aligned) == launch.stream_of(large[1:].clone()) == 5
    assert launch.stream_of(large[:64]) is launch.stream_of(aligned, large) is None


@pytest.mark.parametrize("unaligned", ["x", "dy"])
def test_unaligned_tensors_of_others_are_left_to_triton(unaligned, monkeypatch):
    def tensor(name, *shape):
        numbers = torch.empty(math.prod(shape) + 1)
        return numbers[1:].view(shape) if name == unaligned else numbers[:-1].view(shape)

    def run():
        x, dy = tensor("x", 2, 32, 8, 8), tensor("dy", 2, 32, 8, 8)
        w, c, count = torch.empty(32), torch.empty(33)[1:], torch.tensor(0)
        _, saved = triton_bcn.bcn_forward(x, w, w, c, c, c, c, count, 1e-5, 0.01, 1e-5, None)
        triton_bcn.bcn_backward(dy, x, w, c, c, saved, (True, True))
        weight, dy = tensor("x", 8, 4, 3, 3), tensor("dy", 8, 4, 3, 3)
        triton_ws.ws_forward(weight, "biased", 1e-5, None)
        triton_ws.ws_backward(dy, weight, (), "biased", 1e-5)

    aligned = [call.aligned for call in aot.recorded(monkeypatch, run)]
    assert aligned == [unaligned != "x"] * 3 + [False] * 3 + [unaligned != "x", False]


def test_forms_that_differ_are_kept_apart(monkeypatch):
    """A direct launch looks at nothing, so what decides on the form has to be in its key."""

    def forms(x_type=torch.float32, dy_type=torch.float32, affine=True, moves=True, y_type=None):
        def run():
            with torch.device("meta"):
                x, dy = torch.empty(1, 64, 8, 8, dtype=x_type), torch.empty(1, 64, 8, 8).to(dy_type)
                w, c, count = torch.empty(32), torch.empty(64), torch.empty((), dtype=torch.int64)
                bn = (c, c) if affine else (None, None)
                rate = 0.1 if moves else None
                _, saved = triton_bcn.bcn_forward(
                    x, w, w, *bn, c, c, count, 1e-5, rate, 1e-5, y_type
                )
                triton_bcn.bcn_backward(dy, x, w, *bn, saved, (True, affine and moves))
                ws, _ = triton_ws.ws_forward(x.flatten(0, 1)[:, None], "biased", 1e-5, y_type)
                triton_ws.ws_backward(dy.view_as(ws), x.view_as(ws), (), "biased", 1e-5)

        calls = aot.recorded(monkeypatch, run)
        assert [call.name for call in calls] == [*BCN, "standardize", "standardize"]
        kinds = {}
        for call in calls:
            kinds[id(call.code)] = tuple(getattr(a, "dtype", type(a)) for a in call.args)
        return kinds

    seen = forms()
    for options in [
        {"x_type": HALF}, {"dy_type": HALF}, {"affine": False}, {"moves": False},
        {"y_type": HALF}, {"x_type": HALF, "y_type": torch.float32},
    ]:  # fmt: skip
        for code, kinds in forms(**options).items():
            assert seen.setdefault(code, kinds) == kinds, options


def test_plans_are_kept_by_what_they_depend_on(monkeypatch):
    calls = []
    for shape in ((1, 64, 8, 8), (1, 64, 8, 8), (1, 64, 16, 8)):
        calls.append(aot.recorded(monkeypatch, lambda shape=shape: bcn_step(shape)))
    first, again, other = ([call.args[-4:] for call in step] for step in calls)
    assert first == again != other
    half = aot.recorded(monkeypatch, lambda: bcn_step((1, 64, 8, 8), dtype=HALF))
    assert half[0].args[0].dtype == HALF and half[0].args[1].dtype == torch.float32


def test_layers_compile_no_graphs_of_their_own(monkeypatch):
    from torch._dynamo.utils import counters

    counters.clear()
    monkeypatch.setenv("WSBCN_FUSED", "triton")
    with torch.device("meta"):
        model = nn.Sequential(
            *[WSConv2d(c, 2 * c, 1, norm=BatchChannelNorm2d(2 * c)) for c in (32, 64, 128, 256)]
        )

    def run():
        for training in (True, False, True):
            model.train(training)(torch.empty(1, 32, 8, 8, device="meta")).sum().backward()

    assert len(aot.recorded(monkeypatch, run)) == 3 * 4 * 8
    assert not any(counters.values())


def test_without_a_compiler_python_serves_and_says_so(monkeypatch, caplog):
    def fail(name):
        raise OSError("there is no C++ compiler (c++, g++ or $CXX)")

    monkeypatch.setattr(build, "load_module", fail)
    cuda_nodes.nodes.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert cuda_nodes.nodes() is None and triton_bcn.nodes() is None
        (record,) = caplog.records  # one, however often it is asked
        assert "three times the host time" in record.message and "no C++ compiler" in record.message
        monkeypatch.setattr(torch.version, "hip", "6.0")
        cuda_nodes.nodes.cache_clear()
        assert cuda_nodes.nodes() is None and len(caplog.records) == 1  # not for ROCm
    finally:
        cuda_nodes.nodes.cache_clear()


def test_only_kernels_of_the_expected_kind_are_launched_without_python():
    """The nodes pass pointers, a rate and sizes, and nothing else that Triton may want."""

    def made(signature, **special):
        about = {
            "global_scratch_size": 0, "profile_scratch_size": 0, "num_ctas": 1,
            "launch_cooperative_grid": False, "launch_pdl": False, "shared": 512,
        }  # fmt: skip
        return SimpleNamespace(
            src=SimpleNamespace(signature=dict(enumerate(signature))), function=7, run=print,
            packed_metadata=(), metadata=SimpleNamespace(**{**about, **special}),
        )  # fmt: skip

    usual = ["*fp32", "*fp16", "constexpr", "fp64", "i32", "i32"]

    def plain(made):
        form = launch._Code(None, 4, ())
        form.keep(made, 6)
        return form.plain

    assert plain(made(usual)) == (7, 128, 512)
    assert plain(made([*usual[:3], "i32", "i32", "constexpr"])) == (7, 128, 512)
    for other in ("fp32", "i64", "*i32"):
        assert plain(made([*usual[:4], other, "i32"])) is None
    assert plain(made(usual[:5])) is None
    for name in ("global_scratch_size", "profile_scratch_size", "launch_pdl"):
        assert plain(made(usual, **{name: 1})) is None
    assert plain(made(usual, launch_cooperative_grid=True)) is None
    assert plain(made(usual, num_ctas=2)) is None
    assert plain(None) is None


@pytest.mark.parametrize("own, entered", [(3, []), (1, [3])])
def test_a_function_runs_with_its_tensors_gpu_as_the_current_one(own, entered, monkeypatch):
    seen = []

    class Device:
        def __init__(self, index):
            seen.append(index)

        def __enter__(self):
            seen.append("within")

        def __exit__(self, *_):
            seen.append("left")

    def named(x, *args):
        """What it does."""
        seen.append(args)
        return "result"

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(launch, "_current_device", lambda: own)
    run = launch.on_its_device(named)
    assert (run.__name__, run.__doc__) == ("named", "What it does.")
    assert run(SimpleNamespace(is_cuda=True, get_device=lambda: 3), 1, 2) == "result"
    assert seen == ([3, "within", (1, 2), "left"] if entered else [(1, 2)])
    seen.clear()
    assert run(torch.ones(1)) == "result" and seen == [()]


@pytest.mark.parametrize("last", [True, False])
def test_numbers_lie_in_memory_as_they_are(last):
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(2, 3, 4, 5)
    same = x.contiguous(memory_format=layout)
    assert launch.dense(same, last) is same  # nothing is copied without need
    zeros = torch._efficientzerotensor(2, 3, 4, 5)
    for given, wanted in (
        (x, x),
        (x.to(memory_format=torch.channels_last), x),
        (x[:, :, ::2], x[:, :, ::2]),
        (torch._neg_view(x), -x),
        (zeros, torch.zeros(2, 3, 4, 5)),
    ):
        found = launch.dense(given, last)
        assert torch.equal(found, wanted) and found.is_contiguous(memory_format=layout)
        assert not found.is_neg() and not found._is_zerotensor() and found.dtype == x.dtype


def test_a_plan_is_there_when_all_of_its_launches_are_compiled():
    kernel = Kernel(3)
    about = {"global_scratch_size": 0, "profile_scratch_size": 0, "num_ctas": 1, "shared": 96}
    about |= {"launch_cooperative_grid": False, "launch_pdl": False}
    kernel.made.metadata = SimpleNamespace(**about)
    kernel.made.src.signature = {"x": "*fp32", "n": "i32", "EPS": "constexpr"}
    one = launch.Launch(kernel, 7, ("plan",), (3,), 4, EPS=0.5)
    two = launch.Launch(kernel, 9, ("plan, other",), (4,), 8, EPS=0.5)
    assert one.plain() is None and launch.plan(1, 2, one, two) is None
    one(11, "x")
    assert one.plain() == ("function", 7, 128, 96, (3,))  # threads: 32 for each of 4 warps
    assert launch.plan(1, 2, one, two) is None
    two(11, "x")
    assert launch.plan(5, 6, one, two) == (5, 6, (one.plain(), ("function", 9, 256, 96, (4,))))
    assert launch.plan(5, 6) == (5, 6, ())


def test_whatever_keeps_triton_from_launching_is_a_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(launch, "_nothing", None)  # would be no kernel
    assert launch.trouble() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert launch.trouble() == "TypeError: 'NoneType' object is not subscriptable"
