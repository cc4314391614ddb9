"""Unpickling that runs no code: two readers that build nothing but plain data.

Both are the pure-Python unpickler (its memo is a dict, so that no opcode can ask for a huge
array), with a ``find_class`` that hands out stand-ins written here. The names in a file choose
among these stand-ins; they never import or call anything.
"""

import collections
import io
import pickle

import numpy as np

from .errors import CheckpointError

MAX_BYTES = 16 << 30  # larger than any checkpoint that this project reads
_PLAIN = {kind.__name__: kind for kind in (dict, list, set, tuple, float, complex, bool)}


class _DType:
    """Stand-in for numpy.dtype: the type string and the byte order, checked."""

    def __init__(self, spec=None, align=False, copy=False):
        if not isinstance(spec, (str, bytes)):
            raise CheckpointError("a numpy dtype without a type string")
        spec = spec.decode("latin1") if isinstance(spec, bytes) else spec
        try:
            self.dtype = np.dtype(spec)
        except TypeError as err:
            raise CheckpointError(f"unknown numpy dtype {spec!r}") from err
        if self.dtype.kind not in "biufcSU":
            raise CheckpointError(f"numpy dtype {spec!r} is not numeric: not a checkpoint's array")

    def __setstate__(self, state):
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else "|"
        order = order.decode("latin1") if isinstance(order, bytes) else order
        if order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(order)


def _array(shape, dtype, fortran, raw):
    """An array from a pickle's shape, dtype and bytes; the product has to fit the bytes."""
    if not isinstance(dtype, _DType) or not isinstance(shape, tuple):
        raise CheckpointError("a numpy array with a malformed header")
    if not all(isinstance(n, int) and n >= 0 for n in shape):
        raise CheckpointError(f"a numpy array with shape {shape!r}")
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    if not isinstance(raw, (bytes, bytearray)):
        raise CheckpointError("a numpy array of objects: not a checkpoint's array")
    count = 1
    for n in shape:
        count *= n
    if count * dtype.dtype.itemsize != len(raw):
        raise CheckpointError(
            f"a numpy array of shape {shape} and type {dtype.dtype} with {len(raw)} bytes of data"
        )
    flat = np.frombuffer(bytearray(raw), dtype=dtype.dtype)
    array = flat.reshape(shape, order="F" if fortran else "C")
    # Torch takes native byte order and C layout only.
    return np.ascontiguousarray(array.astype(dtype.dtype.newbyteorder("="), copy=False)).reshape(
        shape
    )


class _Array:
    """Stand-in for numpy.ndarray while its pickle is being read."""

    array = None

    def __setstate__(self, state):
        if not isinstance(state, tuple) or len(state) != 5:
            raise CheckpointError("a numpy array with a malformed state")
        _, shape, dtype, fortran, raw = state
        self.array = _array(shape, dtype, fortran, raw)


def _reconstruct(kind=None, shape=None, code=None):
    if kind is not _Array:
        raise CheckpointError("a numpy subclass: not a checkpoint's array")
    return _Array()


def _scalar(dtype=None, raw=b""):
    return _array((), dtype, False, raw)[()]


def _from_buffer(raw=b"", dtype=None, shape=(), order="C"):
    return _array(shape, dtype, order == "F", raw)


def _encode(text="", encoding="latin1"):
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise CheckpointError("text in an encoding other than latin-1")
    return text.encode("latin1")


_NUMPY = {
    "ndarray": _Array,
    "dtype": _DType,
    "core.multiarray._reconstruct": _reconstruct,
    "core.multiarray.scalar": _scalar,
    "core.numeric._frombuffer": _from_buffer,
}
_ADMITTED = {f"numpy.{name}": value for name, value in _NUMPY.items()}
_ADMITTED |= {name.replace("numpy.core", "numpy._core"): v for name, v in _ADMITTED.items()}
_ADMITTED |= {f"builtins.{name}": kind for name, kind in _PLAIN.items()}
_ADMITTED |= {f"__builtin__.{name}": kind for name, kind in _PLAIN.items()}
_ADMITTED["collections.OrderedDict"] = collections.OrderedDict
_ADMITTED["_codecs.encode"] = _encode


class _ArrayUnpickler(pickle._Unpickler):
    def find_class(self, module, name):
        found = _ADMITTED.get(f"{module}.{name}")
        if found is None:
            raise CheckpointError(
                f"it holds {module}.{name}, and only numpy arrays and plain containers are admitted"
            )
        return found

    def persistent_load(self, pid):
        raise CheckpointError("it refers to data outside itself: not a pickled dict of arrays")


def _finished(value, done):
    """Replaces the stand-ins; ``done`` keeps shared parts shared, however often they are used."""
    if id(value) in done:
        return done[id(value)]
    result = value
    if isinstance(value, _Array):
        if value.array is None:
            raise CheckpointError("a numpy array without data")
        result = value.array
    elif isinstance(value, dict):
        result = {key: _finished(item, done) for key, item in value.items()}
    elif isinstance(value, (list, tuple)):
        result = type(value)([_finished(item, done) for item in value])
    done[id(value)] = result
    return result


def load_arrays(stream: io.BufferedIOBase):
    """Unpickles numpy arrays and plain containers, those of Python 2 included.

    Args:
        stream: binary file at the start of the pickle.

    Returns:
        what was pickled; arrays are C-contiguous in native byte order.

    Raises:
        CheckpointError: anything else in the file, or a file cut short.
    """
    try:
        return _finished(_ArrayUnpickler(stream, encoding="latin1").load(), {})
    except CheckpointError:
        raise
    # A damaged stream can fail anywhere in the unpickler.
    except Exception as err:
        raise CheckpointError(f"the pickle is damaged or cut short ({_reason(err)})") from err


def _reason(err):
    return f"{type(err).__name__}: {err}".splitlines()[0][:120]


_ITEM_BYTES = {
    "DoubleStorage": 8,
    "FloatStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
    "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16,
    "UntypedStorage": 1,
}
_TORCH = {
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.nn.parameter.Parameter",
    "torch.Size",
    "torch.device",
    "torch.Tensor",
    "torch.serialization._get_layout",
    "collections.Counter",
    "builtins.bytearray",
    "builtins.set",
    "builtins.complex",
    "_codecs.encode",
}
# Scalars in the "meta" of mmdetection's files; torch.load is told to admit the same ones.
NUMPY_SCALARS = {
    f"numpy.{name}" for name in ("dtype", "core.multiarray.scalar", "_core.multiarray.scalar")
}


class _Inert:
    """Takes any call and any state and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return self

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, item):
        pass

    def extend(self, items):
        pass


class _StorageSurvey(pickle._Unpickler):
    """Lists the storages that a torch pickle speaks of, without making one."""

    def __init__(self, stream):
        super().__init__(stream)
        self.storages = {}

    def find_class(self, module, name):
        path = f"{module}.{name}"
        if path == "collections.OrderedDict":
            return collections.OrderedDict
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return name
        dtype = module == "torch" and name in _TORCH_DTYPES
        if path not in _TORCH and path not in NUMPY_SCALARS and not dtype:
            raise CheckpointError(f"it holds {path}, and only tensors and plain data are admitted")
        return _Inert

    def persistent_load(self, pid):
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise CheckpointError("it refers to something other than a tensor's storage")
        kind, key, count = pid[1], str(pid[2]), pid[4]
        if kind not in _ITEM_BYTES or not isinstance(count, int) or count < 0:
            raise CheckpointError(f"a storage of {count!r} elements of unknown type {kind!r}")
        self.storages[key] = count * _ITEM_BYTES[kind]
        return _Inert()


_TORCH_DTYPES = {
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "complex64",
    "complex128",
}


def survey_storages(stream: io.BufferedIOBase, pickles: int = 1) -> dict[str, int]:
    """Reads what a torch pickle claims to hold, before torch allocates it.

    Args:
        stream: binary file at the start of the pickle; left after the last one read.
        pickles: how many follow each other (torch's old format has four before the data).

    Returns:
        storage key -> bytes, of the last pickle.

    Raises:
        CheckpointError: other objects than tensors and plain data, or a damaged pickle.
    """
    try:
        for _ in range(pickles):
            survey = _StorageSurvey(stream)
            survey.load()
        return survey.storages
    except CheckpointError:
        raise
    except Exception as err:  # as above
        raise CheckpointError(f"the pickle is damaged or cut short ({_reason(err)})") from err
