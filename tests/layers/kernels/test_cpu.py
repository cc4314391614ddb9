"""The C++ kernels: how they are built, and that nothing depends on their being there."""

import logging
import multiprocessing
import os
import subprocess
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from wsbcn_d2 import BatchChannelNorm2d, standardize_weight
from wsbcn_d2.layers.kernels import build, cpu, dispatch
from wsbcn_d2.layers.kernels.dispatch import (
    backend_name,
    bcn_backend,
    requested_backend,
    ws_backend,
)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache folder, and nothing loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("WSBCN_FUSED", raising=False)
    cpu._libraries.clear()
    yield tmp_path / "wsbcn_d2"
    cpu._libraries.clear()


def serving(dtype):
    """The backends of a BCN and of a weight of one type on a CPU."""
    norm = BatchChannelNorm2d(8, 4).to(dtype)
    bn = norm.bn
    tensors = (norm.weight, norm.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)
    x = torch.randn(1, 8, 2, 2, dtype=dtype)
    return bcn_backend(x, *tensors, bn.num_batches_tracked), ws_backend(x)


def test_they_are_what_a_cpu_runs_by_default(monkeypatch):
    monkeypatch.delenv("WSBCN_FUSED", raising=False)
    assert serving(torch.float32) == serving(torch.float64) == (cpu, cpu)
    monkeypatch.setenv("WSBCN_FUSED", "off")
    assert serving(torch.float32) == (None, None)
    assert backend_name(torch.ones(1)) == "off"
    monkeypatch.setenv("WSBCN_FUSED", "cpp")
    assert backend_name(torch.ones(1)) == "cpp"
    assert backend_name(torch.ones(1, device="meta")) == "off"
    assert ws_backend(torch.ones(2, 3, 1, 1, device="meta")) is None


def test_a_build_is_kept_and_used_again(fresh, monkeypatch):
    assert cpu.load_kernels(torch.float32)
    (made,) = fresh.iterdir()  # nothing else is left
    assert made.name.startswith("cpu-")
    written = made.stat().st_mtime_ns
    cpu._libraries.clear()
    assert cpu.load_kernels(torch.float32)
    assert made.stat().st_mtime_ns == written
    cpu._libraries.clear()
    monkeypatch.setattr(build, "_processor", lambda: "another processor of the same cluster")
    assert cpu.load_kernels(torch.float32)
    assert len(list(fresh.iterdir())) == 2


@pytest.mark.parametrize(
    "mode, loads", [(0o700, True), (0o755, True), (0o720, False), (0o702, False)]
)
def test_a_folder_that_others_may_write_is_not_loaded_from(fresh, mode, loads):
    fresh.mkdir()
    fresh.chmod(mode)
    if loads:
        assert build._cache_folder() == fresh
    else:
        with pytest.raises(OSError, match="can be written by others"):
            build._cache_folder()


def test_what_a_build_is_kept_by(fresh, monkeypatch, tmp_path):
    """Source, headers, compiler, its version, flags, machine and processor: each makes another."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.setattr(build, "_HERE", folder)
    source, header = folder / "a.cpp", folder / "a.h"
    source.write_text("int a;"), header.write_text("int b;")

    def compiler(name, version):
        path = tmp_path / name
        lines = [f'if [ "$1" = --version ]; then echo {version}; exit; fi']
        lines += ['while [ "$1" != -o ]; do shift; done', 'touch "$2"']
        path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))

    def built(*flags):
        path = build._build(source, flags)
        assert path.is_file() and path.parent == fresh and path.name.startswith("a-")
        return path.name

    compiler("one", "1.0")
    names = [built("-O2"), built("-O3"), built("-O2", "-g")]
    assert built("-O2") == names[0]
    compiler("one", "2.0")
    names.append(built("-O2"))
    compiler("two", "1.0")
    names.append(built("-O2"))
    for name in ("machine", "processor"):
        with monkeypatch.context() as patch:
            where = build.platform if name == "machine" else build
            patch.setattr(where, "machine" if name == "machine" else "_processor", lambda: "other")
            names.append(built("-O2"))
    header.write_text("int c;")
    names.append(built("-O2"))
    source.write_text("int d;")
    names.append(built("-O2"))
    assert len(set(names)) == len(names) == len(list(fresh.iterdir()))


def _homeless():
    raise RuntimeError("no home directory")


@pytest.mark.parametrize(
    "case", ["no compiler", "failing compiler", "folder of others", "no folder", "no home"]
)
def test_without_them_the_results_are_the_same(fresh, monkeypatch, caplog, case):
    if case == "no compiler":
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(build.shutil, "which", lambda name: None)
    elif case == "failing compiler":
        script = fresh.parent / "compiler"
        script.write_text(
            '#!/bin/sh\n[ "$1" = --version ] || { echo "x: error: 42" >&2; exit 1; }\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
    elif case == "folder of others":
        fresh.mkdir()
        fresh.chmod(0o777)
    elif case == "no folder":
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(build.Path, "home", _homeless)
    reasons = {
        "no compiler": "no C++ compiler",
        "failing compiler": "x: error: 42",
        "folder of others": "can be written by others",
        "no folder": "/proc/nowhere",
        "no home": "no home directory",
    }
    norm, x = BatchChannelNorm2d(8, 4), torch.randn(2, 8, 5, 5, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3)
    with caplog.at_level(logging.WARNING, logger="wsbcn_d2.layers.kernels"):
        found = norm(x), standardize_weight(weight)
        norm(x)
        norm.double()(x.double())
    assert serving(torch.float32) == serving(torch.float64) == (None, None)
    assert backend_name(torch.ones(1)) == "off"
    (message,) = [r.getMessage() for r in caplog.records if "no C++ kernels" in r.getMessage()]
    assert "5 times the time" in message
    assert reasons[case] in message
    cpu._libraries.clear()
    monkeypatch.undo()
    again = BatchChannelNorm2d(8, 4)
    assert serving(torch.float32) == (cpu, cpu)
    assert_close(found, (again(x), standardize_weight(weight)))


def test_a_compiler_that_hangs_is_given_up(fresh, monkeypatch):
    stock = subprocess.run

    def run(command, **options):
        if "--version" in command:
            return stock(command, **options)
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(OSError, match=r"timed out after \d+ seconds"):
        build.load("float")


def test_processes_that_build_at_the_same_time_all_load(tmp_path, monkeypatch):
    fork = multiprocessing.get_context("fork")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    processes = [fork.Process(target=build.load, args=("float",)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list((tmp_path / "wsbcn_d2").iterdir())) == 1


@pytest.mark.parametrize("break_", ["type", "size", "stride"])
def test_tensors_that_a_kernel_would_misread_are_not_given_to_it(monkeypatch, break_):
    """PyTorch's own operations stride or refuse; a kernel would read what is not there."""
    monkeypatch.setenv("WSBCN_FUSED", "cpp")
    norm, x = BatchChannelNorm2d(8, 4).eval(), torch.randn(2, 8, 5, 5)
    called = []
    monkeypatch.setattr(cpu, "bcn_forward", lambda *args: called.append(args))
    if break_ == "type":
        norm.bn.bias = nn.Parameter(norm.bn.bias.detach().double())
    elif break_ == "size":
        norm.bn.bias = nn.Parameter(torch.zeros(4))
    else:
        norm.bn.bias = nn.Parameter(torch.zeros(8, 2)[:, 0])
    try:
        norm(x)
    except RuntimeError:
        assert break_ != "stride"
    assert not called


@pytest.mark.parametrize("numel, expected", [(32767, 1), (32768, 3), (100000, 3)])
def test_threads_from_so_many_numbers_on(monkeypatch, numel, expected):
    monkeypatch.setenv("WSBCN_FUSED", "cpp")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    kernels, threads = cpu.load_kernels(torch.float32), []

    class Recorded:
        def __getattr__(self, name):
            return lambda *args: threads.append(args[-1]) or getattr(kernels, name)(*args)

    monkeypatch.setitem(cpu._libraries, torch.float32, Recorded())
    x = torch.randn(1, 1, 1, numel, requires_grad=True)
    BatchChannelNorm2d(1, 1)(x).sum().backward()
    standardize_weight(x).sum().backward()
    assert threads == [expected] * 4  # each layer forward and backward


def test_bits_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setenv("WSBCN_FUSED", "cpp")
    x, weight = torch.randn(2, 8, 60, 60), torch.randn(64, 64, 3, 3)
    assert x.numel() > cpu._GRAIN and weight.numel() > cpu._GRAIN

    def run(threads):
        torch.set_num_threads(threads)
        norm = BatchChannelNorm2d(8, 4)
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        outputs = norm(leaves[0]), standardize_weight(leaves[1])
        sum(y.pow(3).sum() for y in outputs).backward()
        parameters = [p.grad for p in norm.parameters()]
        return [*outputs, *(leaf.grad for leaf in leaves), *parameters, *norm.buffers()]

    before = torch.get_num_threads()
    try:
        one, several = run(1), run(3)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))


def test_moving_the_estimates_is_seen_by_autograd(monkeypatch):
    monkeypatch.setenv("WSBCN_FUSED", "cpp")
    norm, x = BatchChannelNorm2d(4, 2), torch.randn(1, 4, 3, 3)
    factor = torch.ones(4, requires_grad=True)
    y = factor * norm.bn.running_mean  # keeps the mean for backward
    norm(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with torch.inference_mode():
        norm.bn.running_mean = norm.bn.running_mean.clone()
        assert norm(x).isfinite().all()


@pytest.mark.parametrize("mean", [0.0, 30.0, 1e4])
@pytest.mark.parametrize("size", [1, 63, 1024, 2500])
def test_moments_of_rows_whose_mean_is_large(mean, size):
    """The sums' rounding moves the centre of a block; its variance must not feel that."""
    x = mean + 0.02 * torch.randn(1, 8, 1, size)
    ones, zeros = torch.ones(8), torch.zeros(8)
    _, rows = cpu.bcn_forward(
        x, ones[:4], zeros[:4], ones, zeros, zeros, ones, None, 1e-5, None, 1e-5, None
    )
    var, expected = torch.var_mean(x.double()[:, :, 0], dim=2, correction=0)
    assert_close(rows[0].double(), expected, rtol=1e-6, atol=1e-7)
    assert_close(rows[1].double(), var, rtol=1e-4, atol=1e-12)


def test_one_bad_channel_leaves_the_estimates_of_all_in_use(monkeypatch):
    outputs, norm = {}, BatchChannelNorm2d(8, 4, update_rate=0.5)
    norm(torch.randn(2, 8, 3, 3))
    state = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    x = 3 + torch.randn(2, 8, 3, 3)
    x[1, 2, 0, 0] = torch.inf
    for backend in ("cpp", "off"):
        monkeypatch.setenv("WSBCN_FUSED", backend)
        outputs[backend] = norm(x)
        for name, tensor in norm.state_dict().items():
            assert torch.equal(tensor, state[name]), (backend, name)
    good = [0, 1, 4, 5, 6, 7]
    assert outputs["cpp"][:, good].isfinite().all()
    assert_close(outputs["cpp"][:, good], outputs["off"][:, good])


def test_an_empty_variable_is_an_unset_one(monkeypatch):
    monkeypatch.setenv("WSBCN_FUSED", "")
    assert requested_backend() == "auto" and serving(torch.float32) == (cpu, cpu)
    monkeypatch.setenv("WSBCN_FUSED", "cuda")
    with pytest.raises(ValueError, match="'cuda': use one of auto, cpp, triton, off$"):
        requested_backend()


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize(
    "wanted, device, expected",
    [
        *(("auto", "cuda", "triton"), ("auto", "mps", "off"), ("auto", "cpu", "cpp")),
        *(("triton", "cpu", "triton"), ("cpp", "cuda", "off"), ("off", "cuda", "off")),
    ],
)
def test_what_serves_on_which_device(wanted, device, expected, triton, monkeypatch):
    """Told by a tensor's device alone, and by whether Triton is installed."""
    monkeypatch.setenv("WSBCN_FUSED", wanted)
    asked = []
    monkeypatch.setattr(
        dispatch.importlib.util, "find_spec", lambda name: asked.append(name) or (triton or None)
    )
    tensor = SimpleNamespace(
        device=torch.device(device), is_cpu=device == "cpu", dtype=torch.float32
    )
    assert backend_name(tensor) == ("off" if expected == "triton" and not triton else expected)
    assert asked == ["triton"] * (expected == "triton")


def test_the_cache_is_its_owners_alone(fresh, monkeypatch):
    before = os.umask(0)
    try:
        build._cache_folder()
    finally:
        os.umask(before)
    assert fresh.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "getuid", lambda: fresh.stat().st_uid + 1)
    with pytest.raises(OSError, match="can be written by others"):
        build._cache_folder()


def test_a_processor_is_what_it_can_do(monkeypatch):
    """Not its number or speed: neither decides on what -march=native makes."""
    texts = {
        "processor\t: 0\ncpu MHz : 1\nflags\t\t: fpu avx2\nflags : other\n": "flags\t\t: fpu avx2",
        "processor : 0\nFeatures : asimd sve\n": "Features : asimd sve",
        "processor : 0\n": "",
    }
    for text, expected in texts.items():
        monkeypatch.setattr(build.Path, "read_text", lambda self, *_, text=text: text)
        assert build._processor() == expected

    def absent(self):
        raise FileNotFoundError

    monkeypatch.setattr(build.Path, "read_text", absent)
    monkeypatch.setattr(build.platform, "processor", lambda: "what Python knows")
    assert build._processor() == "what Python knows"


@pytest.mark.parametrize(
    "load, seconds", [(lambda: build.load("double"), 120), (lambda: build.load_module("x"), 600)]
)
def test_a_build_has_its_time_and_its_error_is_the_line_that_says_so(load, seconds, monkeypatch):
    def run(command, **options):
        if "--version" in command:
            return SimpleNamespace(stdout="1")
        assert options["timeout"] == seconds
        error = "In file included:\n  x.h:3: fatal error: no such type \nnote: see there\nerror 2"
        raise subprocess.CalledProcessError(1, command, stderr=error)

    monkeypatch.setattr(build, "_cache_folder", lambda: build.Path("/nowhere"))
    monkeypatch.setattr(build.Path, "read_text", lambda *_: "")
    monkeypatch.setattr(build.tempfile, "TemporaryDirectory", lambda dir: nullcontext(dir))
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(OSError) as caught:
        load()
    assert str(caught.value) == "x.h:3: fatal error: no such type"


def test_the_compiler_may_have_words_of_its_own(fresh, monkeypatch):
    ran = []

    def run(command, **options):
        ran.append(command)
        if "--version" not in command:
            build.Path(command[command.index("-o") + 1]).touch()
        return SimpleNamespace(stdout="1")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("CXX", "ccache g++-9")
    source = build._HERE / "cpu.cpp"
    build._build(source, ("-O1",), ("-lx",))
    assert ran[0] == ["ccache", "--version"]
    assert ran[1][:5] == ["ccache", "g++-9", "-fPIC", "-shared", "-O1"]
    assert ran[1][5] == str(source) and ran[1][6] == "-o" and ran[1][8:] == ["-lx"]
    for there, expected in (({"c++", "g++"}, "c++"), ({"g++"}, "g++")):
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(
            build.shutil, "which", lambda name, t=there: name if name in t else None
        )
        build._build(source, ("-O1",))
        assert ran[-2] == [expected, "--version"]


def test_every_estimate_that_moves_is_seen_by_autograd(monkeypatch):
    monkeypatch.setenv("WSBCN_FUSED", "cpp")
    norm, x = BatchChannelNorm2d(4, 2), torch.randn(1, 4, 3, 3)

    def versions():
        return [buffer._version for buffer in norm.buffers()]

    before = versions()
    norm(x)
    assert versions() == [version + 1 for version in before] and len(before) == 3
    norm.eval()(x)
    assert versions() == [version + 1 for version in before]
