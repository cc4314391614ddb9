"""Unpickling that runs no code: tensors, arrays and plain data, and inert things for the rest.

The names in a pickle choose among what is admitted here; they never import or call anything. That
holds for every version of torch, whose own loading is not used. `check_opcodes` bounds memory and
time before anything is built.
"""

import _codecs
import math
import pickle
import pickletools
import sys
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
import torch

from ..errors import CheckpointError, NotAdmittedError

__all__ = ["Foreign", "RestrictedUnpickler", "check_opcodes"]

_DEPTH = 1000  # of nested tuples, which Python hashes and frees by recursion
_KINDS = "biufcSU"  # of numpy's types: numbers and text
# What is dropped although it is from the standard library; its other names are never meant well.
_HARMLESS = {
    "argparse.Namespace",
    "types.SimpleNamespace",
    *(f"pathlib.{kind}Path" for kind in ("", "Posix", "Windows", "PurePosix", "PureWindows")),
    *(f"pathlib._local.{kind}Path" for kind in ("", "Posix", "Windows")),
    *(f"datetime.{kind}" for kind in ("datetime", "date", "time", "timedelta", "timezone")),
}


class Foreign:
    """Stands for any object that is neither tensor nor plain data; takes all, does nothing."""

    path = ""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return self

    def _ignore(self, *args):
        pass

    __setstate__ = __setitem__ = append = extend = add = _ignore


class _Dict(dict):
    """A dict of any kind (ordered, counter, default); attributes of its own are left behind."""

    __slots__ = ()

    def __init__(self, items=(), *args):
        super().__init__(() if items is None or callable(items) else items)

    def __setstate__(self, state):
        pass


class _DType:
    """Stands for numpy.dtype: a numeric or text type and its byte order."""

    def __init__(self, spec=None, align=False, copy=False):
        spec = spec.decode("latin1") if isinstance(spec, bytes) else spec
        if not isinstance(spec, str) or len(spec) > 12:
            raise CheckpointError("a numpy dtype without a type string")
        try:
            self.dtype = np.dtype(spec)
        except TypeError as err:
            raise CheckpointError(f"unknown numpy dtype {spec!r}") from err
        if self.dtype.kind not in _KINDS:
            raise CheckpointError(f"numpy dtype {spec!r} is not numeric: not a checkpoint's array")

    def __setstate__(self, state):
        order = state[1].decode() if isinstance(state[1], bytes) else state[1]
        if order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(order)


class _Array(np.ndarray):
    """A numpy array that takes only what its own header describes."""

    def __new__(cls, *args, **kwargs):
        raise CheckpointError("a numpy array without a header")

    def __setstate__(self, state):
        if not isinstance(state, tuple) or len(state) != 5:
            raise CheckpointError("a numpy array with a malformed state")
        array = _array(*state[1:])
        super().__setstate__((1, array.shape, array.dtype, False, array.tobytes()))


def _array(shape, dtype, fortran, raw):
    """An array from a pickle's shape, dtype and bytes, in native order and C layout."""
    if not isinstance(dtype, _DType) or not isinstance(shape, tuple):
        raise CheckpointError("a numpy array with a malformed header")
    if not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        raise CheckpointError("a numpy array with a shape that is none")
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    if not isinstance(raw, (bytes, bytearray)):
        raise CheckpointError("a numpy array of objects: not a checkpoint's array")
    count, dtype = math.prod(shape), dtype.dtype
    if count * dtype.itemsize != len(raw):
        raise CheckpointError(
            f"a numpy array of shape {shape} and type {dtype} with {len(raw)} bytes of data"
        )
    array = np.ndarray(shape, dtype, bytearray(raw), order="F" if fortran else "C")
    return np.ascontiguousarray(array, dtype.newbyteorder("=")).reshape(shape)


def _reconstruct(kind=None, shape=None, code=None):
    if kind is not _Array:
        raise CheckpointError("a numpy subclass: not a checkpoint's array")
    return np.ndarray.__new__(_Array, (0,), "b")


def _from_buffer(raw=b"", dtype=None, shape=(), order="C"):
    return _array(shape, dtype, order == "F", raw)


def _bytes(text="", encoding="latin1"):
    if not isinstance(text, (str, bytes)) or encoding not in ("latin1", "latin-1"):
        raise CheckpointError("bytes that are not spelled out")
    return _codecs.encode(text, "latin1") if isinstance(text, str) else text


def _attribute(owner=None, name=None):
    """``getattr``, which old protocols use for methods: only of what is inert itself."""
    if not (isinstance(owner, type) and issubclass(owner, Foreign)) or owner.path in _HARMLESS:
        raise NotAdmittedError("it calls getattr, and only tensors and plain data are admitted")
    return owner


def _object(cls=Foreign, base=None, state=None):
    return cls() if isinstance(cls, type) and issubclass(cls, Foreign) else Foreign()


def _tensor(storage, offset, size, stride, grad=False, hooks=None, dtype=None, *rest):
    """A tensor; a type of its own has version 3, the second one has metadata in that place."""
    flat = storage.view(dtype) if isinstance(dtype, torch.dtype) else storage
    return torch.as_strided(flat, tuple(size), tuple(stride), offset)


def _typed(function, kind, args, state):
    """A tensor with attributes or of a subclass: the tensor."""
    if function not in _TENSORS.values():
        raise CheckpointError("a tensor made by no function of torch's")
    return function(*args)


_TENSORS = {
    **{f"torch._utils._rebuild_tensor{version}": _tensor for version in ("", "_v2", "_v3")},
    "torch._utils._rebuild_parameter": lambda data, *rest: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *rest: data,
}
_ADMITTED = {
    **_TENSORS,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch.Tensor": Foreign,
    "torch.nn.parameter.Parameter": Foreign,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "_codecs.encode": _bytes,
    "numpy.ndarray": _Array,
    "numpy.dtype": _DType,
    "numpy.core.multiarray._reconstruct": _reconstruct,
    "numpy.core.multiarray.scalar": lambda dtype, raw=b"": _from_buffer(raw, dtype)[()],
    "numpy.core.numeric._frombuffer": _from_buffer,
    "collections.OrderedDict": _Dict,
    "collections.Counter": _Dict,
    "collections.defaultdict": _Dict,
    "copyreg._reconstructor": _object,
    "builtins.bytes": _bytes,
    "builtins.bytearray": lambda *args: bytearray(_bytes(*args)),
    "builtins.getattr": _attribute,
    "builtins.object": Foreign,
}
_PLAIN = (dict, list, set, frozenset, tuple, int, float, complex, bool)
_ADMITTED |= {f"builtins.{kind.__name__}": kind for kind in _PLAIN}
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # Python 2's
_ITEMS = {"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16"}
_ITEMS |= {"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8"}
_ITEMS |= {"Bool": "bool", "ComplexFloat": "complex64", "ComplexDouble": "complex128"}
_ITEMS |= {"Untyped": "uint8"}
STORAGES = {f"{kind}Storage": getattr(torch, dtype) for kind, dtype in _ITEMS.items()}


class RestrictedUnpickler(pickle.Unpickler):
    """Reads one pickle; `foreign` then names the kinds of object that were left out of it."""

    def __init__(self, stream: BinaryIO, storage: Callable | None = None):
        """
        Args:
            stream: at the start of a pickle that `check_opcodes` has passed.
            storage: persistent id -> flat tensor; None if there is no data beside the pickle.
        """
        super().__init__(stream, encoding="latin1")
        self.storage = storage
        self.foreign: set[str] = set()

    def find_class(self, module, name):
        """What a name in the pickle stands for; imports nothing.

        Refused are functions and classes of Python, numpy and torch that are not admitted.
        """
        module = _RENAMED.get(module, module).replace("numpy._core", "numpy.core")
        path, root = f"{module}.{name}", module.split(".")[0]
        if path in _ADMITTED:
            return _ADMITTED[path]
        if root == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        known = root in sys.stdlib_module_names or root in ("numpy", "torch", "nt", "posix")
        if known and path not in _HARMLESS and not path.startswith("torch.nn.modules."):
            what = "tensors" if self.storage else "numpy arrays"
            raise NotAdmittedError(
                f"it holds {path[:80]}, and only {what} and plain data are admitted"
            )
        self.foreign.add(path[:80])
        return type("Foreign", (Foreign,), {"path": path})

    def persistent_load(self, pid):
        """The flat tensor of a storage."""
        if self.storage is None:
            raise CheckpointError("it refers to data outside itself: not a pickled dict of arrays")
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] not in ("storage", b"storage"):
            raise CheckpointError("it refers to something other than a tensor's storage")
        if not isinstance(pid[1], torch.dtype) or not isinstance(pid[4], int) or pid[4] < 0:
            raise CheckpointError("it refers to a storage of unknown type or size")
        return self.storage(pid)


_NAMES = {"GLOBAL", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"}
_IN_PLACE = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
_CONTAINERS = {"EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "LIST", "DICT"}


class _Item:
    """What the simulation knows of an object: how much hashing or copying it costs, how deep."""

    __slots__ = ("depth", "name", "weight")

    def __init__(self, parts=(), weight=1, name=""):
        self.weight = weight + sum(part.weight for part in parts)
        self.depth = 1 + max((part.depth for part in parts), default=0)
        self.name = name  # of the operation that made it

    def add(self, parts):
        """Grows; a list in a list is never gone through, as it cannot be a key."""
        cost = sum(1 if part.name in _CONTAINERS else part.weight for part in parts)
        self.weight += cost
        self.depth = max(self.depth, *(1 + part.depth for part in parts))
        return cost


class _Bounded:
    """A file whose reads ask for no more memory than it has bytes."""

    def __init__(self, stream, size):
        self.tell, self.readline = stream.tell, stream.readline
        self.read = lambda count: stream.read(min(count, size))


def check_opcodes(stream: BinaryIO, size: int) -> None:
    """Goes through a pickle's operations without carrying them out; leaves the stream behind it.

    What cannot be bounded while unpickling is bounded here: places in the memo (allocated up to
    the highest), objects that contain themselves many times over (a nested pair of 40 levels takes
    2^40 steps as a key), depth, and attributes set on a function or class.

    Raises:
        CheckpointError: out of bounds.
        Exception: of any kind, for a damaged pickle.
    """
    budget = 16 * size + 10_000_000
    stack: list[_Item] = []
    marks: list[int] = []
    memo: dict[int, _Item] = {}
    for count, (opcode, arg, _) in enumerate(pickletools.genops(_Bounded(stream, size))):
        name, before = opcode.name, opcode.stack_before
        if name == "FRAME" and arg > size:
            raise CheckpointError("damaged or cut short: it announces more than it holds")
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            index = len(memo) if name == "MEMOIZE" else arg
            if index > count:
                raise CheckpointError("it numbers objects that it does not have")
            memo[index] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            parts = []
            if pickletools.markobject in before:
                start = marks.pop()
                parts = stack[start:]
                del stack[start:]
                before = before[: before.index(pickletools.markobject)]
            parts += [stack.pop() for _ in before]
            if name in _IN_PLACE:
                stack.append(parts.pop())
                if name == "BUILD" and stack[-1].name in _NAMES:
                    raise CheckpointError("it changes a function or class")
                budget -= stack[-1].add(parts) if parts else 0
            elif opcode.stack_after:
                weight = len(arg) if isinstance(arg, (str, bytes, bytearray)) else 1
                stack.append(_Item(parts, weight, name))
                if not name.startswith("TUPLE"):
                    budget -= stack[-1].weight
            if stack and (stack[-1].weight > budget or stack[-1].depth > _DEPTH):
                raise CheckpointError("its objects contain each other too many times")
