"""Launching Triton kernels at little cost to the host.

Triton's own way to launch looks at every argument to find out which compiled form serves, 15 us a
time. Here that happens at the first launch alone: what decides (types, layout, constants) is fixed
by who asks for a :class:`Launch`, sizes are never specialized on, and of tensors that others made
:func:`stream_of` sees whether they are as usual. From then on the compiled form is called directly,
where this Triton has it as expected; where it has not, Triton's own way serves throughout.
"""

import functools
import re

import torch
import triton

__all__ = [
    "INTERPRETED",
    "Launch",
    "dense",
    "on_gpu",
    "on_its_device",
    "plan",
    "stream_of",
    "trouble",
]


@triton.jit
def _nothing():
    pass


#: Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), which takes CPU tensors.
INTERPRETED = not isinstance(_nothing, triton.runtime.JITFunction)

# Without the checks of torch.cuda.current_device; Triton gets its stream from the same.
_current_device = getattr(torch._C, "_cuda_getDevice", None)
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_SIZE_COUNTS = torch.version.hip is not None


def trouble() -> str | None:
    """Why Triton can launch nothing on this machine's GPU (too old a GPU, no C compiler).

    Returns:
        None if it can, or if there is no GPU.
    """
    if not torch.cuda.is_available():
        return None
    try:
        _nothing[(1,)]()
    except Exception as error:  # of the compiler, the driver, a linker: whatever it is
        return f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return None


def on_gpu(x: torch.Tensor) -> bool:
    """Whether kernels are compiled for where a tensor is (``cuda`` is ROCm's name too)."""
    return x.is_cuda


def on_its_device(function):
    """Have a function run with the device of its first argument, a tensor, as the current one."""

    @functools.wraps(function)
    def run(x, *args):
        if x.is_cuda and x.get_device() != _current_device():
            with torch.cuda.device(x.get_device()):
                return function(x, *args)
        return function(x, *args)

    return run


def stream_of(*tensors: torch.Tensor) -> int | None:
    """The current stream, for direct launches on tensors that others have made.

    Returns:
        None if Triton must look at them itself: it compiles one form for addresses divisible by 16
        and, on AMD, for tensors of up to 2 GB, and others for what is not.
    """
    if not on_gpu(tensors[0]):
        return None
    for tensor in tensors:
        if tensor.data_ptr() & 15:
            return None
        # A result may be twice as large as what it is made of.
        if _SIZE_COUNTS and tensor.untyped_storage().nbytes() >= 2**30:
            return None
    return _raw_stream(tensors[0].get_device())


def dense(x: torch.Tensor, last: bool) -> torch.Tensor:
    """The same numbers in memory as they are: no gaps, no lazy sign, no lazy zeros.

    Args:
        x: shape (N, C, H, W).
        last: whether channels_last is meant, else contiguous.
    """
    layout = torch.channels_last if last else torch.contiguous_format
    if x._is_zerotensor():
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device).contiguous(memory_format=layout)
    if x.is_neg():
        x = x.resolve_neg()
    return x if x.is_contiguous(memory_format=layout) else x.contiguous(memory_format=layout)


class _Code:
    """What Triton made of a kernel for given types and constants."""

    __slots__ = ("constants", "function", "kernel", "metadata", "plain", "run", "warps")

    def __init__(self, kernel, warps: int, constants: tuple):
        self.kernel, self.warps, self.constants = kernel, warps, dict(constants)
        self.run = self.function = self.metadata = None
        self.plain: tuple[int, int, int] | None = None  # (function, threads, shared memory)

    def launch(self, programs: int, aligned: bool, args: tuple) -> None:
        """Triton's own way, after which the direct one is known."""
        made = self.kernel[(programs,)](*args, **self.constants, num_warps=self.warps)
        if aligned:
            self.keep(made, len(args) + len(self.constants))

    def keep(self, made, count: int) -> None:
        """Take the direct way, if it takes the kernel's ``count`` arguments one by one.

        Args:
            made: what a launch returned: None in the interpreter.
            count: arguments and constants; Triton before 3.3 leaves the constants out.
        """
        try:
            if len(made.src.signature) != count:
                return
            self.function, self.metadata = made.function, made.packed_metadata
            self.run = made.run  # last: it says that the others are there
            self.plain = self._without_python(made)
        except AttributeError:  # another Triton, or its interpreter
            return

    def _without_python(self, made) -> tuple[int, int, int] | None:
        about = made.metadata
        special = about.global_scratch_size, about.profile_scratch_size, about.num_ctas - 1
        if any((*special, about.launch_cooperative_grid, about.launch_pdl)):
            return None
        # Pointers, perhaps a rate, sizes: what the nodes in C++ pass.
        kinds = "".join(f"{t} " for t in made.src.signature.values() if t != "constexpr")
        if not re.fullmatch(r"(\*\w+ )+(fp64 )?(i32 )*", kinds):
            return None
        return made.function, 32 * self.warps, about.shared


@functools.cache
def code(kernel, kinds: tuple, warps: int, constants: tuple) -> _Code:
    """The one form of a kernel for given types and constants."""
    return _Code(kernel, warps, constants)


def plan(kept: int, scratch: int, *launches: "Launch") -> tuple | None:
    """What :mod:`.cuda_nodes` is to know of a pass; None while a launch is not compiled."""
    plain = tuple(launch.plain() for launch in launches)
    return None if None in plain else (kept, scratch, plain)


class Launch:
    """A kernel at one size, ready to be launched again and again."""

    __slots__ = ("_code", "_programs", "_sizes", "_tail")

    def __init__(self, kernel, programs: int, kinds: tuple, sizes: tuple, warps: int, **constants):
        """
        Args:
            kernel: takes tensors and scalars, then ``sizes``, then ``constants`` by name.
            programs: how many run.
            kinds: whatever else decides which compiled form serves: device, types, absences.
            sizes: integers that the kernel is not specialized on.
            warps: per program.
        """
        self._code = code(kernel, kinds, warps, tuple(constants.items()))
        self._programs, self._sizes = programs, sizes
        self._tail = (*sizes, *constants.values())

    def plain(self) -> tuple | None:
        """(function, programs, threads, shared memory, sizes) for a launch without Python.

        Returns:
            None if the kernel is not compiled yet, or needs more than that.
        """
        found = self._code.plain
        return found and (found[0], self._programs, *found[1:], self._sizes)

    def __call__(self, stream: int | None, *args) -> None:
        """Launch.

        Args:
            stream: as :func:`stream_of` the tensors finds it.
            *args: tensors and scalars; None for what is absent.
        """
        form = self._code
        if form.run is None or stream is None:
            form.launch(self._programs, stream is not None, (*args, *self._sizes))
        else:
            form.run(
                self._programs, 1, 1, stream, form.function, form.metadata, None, None, None,
                *args, *self._tail,
            )  # fmt: skip
