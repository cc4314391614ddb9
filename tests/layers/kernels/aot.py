"""Compiling recorded launches for named GPUs, on a machine without one."""

import re
import subprocess
import tempfile
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from wsbcn_d2.layers.kernels import triton_launch as launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
    torch.float64: "*fp64", torch.int64: "*i64",
}  # fmt: skip


@dataclass
class Call:
    """One launch that did not happen."""

    kernel: object
    programs: int
    args: tuple  # tensors, scalars and sizes
    constants: dict
    warps: int

    @property
    def name(self) -> str:
        return self.kernel.__name__


def recorded(monkeypatch, run) -> list[Call]:
    """The launches of ``run()``, on tensors of the meta device."""
    calls = []

    def note(code, programs, aligned, args):
        calls.append(Call(code.kernel, programs, args, code.constants, code.warps))

    with monkeypatch.context() as patch:
        patch.setattr(launch, "on_gpu", lambda x: True)
        patch.setattr(launch, "_raw_stream", lambda device: 0)
        patch.setattr(launch._Code, "launch", note)
        run()
    return calls


def key(call: Call) -> tuple:
    """What distinguishes the binaries that calls need."""
    kinds = tuple(a.dtype if isinstance(a, torch.Tensor) else type(a) for a in call.args)
    return call.name, kinds, tuple(call.constants.items()), call.warps


def build(call: Call, target: GPUTarget):
    """Compile as Triton's launcher would: addresses divisible by 16, sizes unknown."""
    kernel, signature, constants, attributes = call.kernel, {}, {}, {}
    values = dict(zip(kernel.arg_names, [*call.args, *call.constants.values()], strict=True))
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            if not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = parameter.annotation_type
        else:
            assert parameter.do_not_specialize and abs(value) < 2**31
            signature[parameter.name] = "i32"
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options={"num_warps": call.warps})


@dataclass
class Resources:
    """Registers of a thread, bytes that it spills, widest access to memory in bits."""

    registers: int
    spilled: int
    load: int
    store: int


def resources(compiled, target: GPUTarget) -> Resources:
    if target.backend != "cuda":
        text = compiled.asm["amdgcn"]

        def count(name):
            return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

        def widest(kind):
            found = re.findall(rf"(?:global|buffer)_{kind}_dword(?:x(\d))?", text)
            return max((32 * int(n or 1) for n in found), default=0)

        spilled = 4 * (count("vgpr_spill_count") + count("sgpr_spill_count"))
        return Resources(count("vgpr_count"), spilled, widest("load"), widest("store"))
    name = f"sm_{target.arch}{'a' if target.arch >= 90 else ''}"
    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        log = subprocess.run(
            [
                triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={name}", file.name,
                "-o", "/dev/null",
            ],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    wide = {"ld": 0, "st": 0}
    access = r"(ld|st)\.global(?:\.[a-zA-Z:0-9_]+)*?(?:\.v(\d))?\.b(\d+)"
    for kind, vector, bits in re.findall(access, compiled.asm["ptx"]):
        wide[kind] = max(wide[kind], int(vector or 1) * int(bits))
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    return Resources(registers, spilled, wide["ld"], wide["st"])
