"""Crafted and fuzzed files: each is read or refused with one line, in 1 GB and 10 seconds.

``WSBCN_FUZZ_CASES`` is the number of fuzzed files per test (default 100; there are four tests).
"""

import contextlib
import io
import json
import os
import pickle
import pickletools
import resource
import struct
import time
import warnings
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors

from wsbcn_d2.checkpoint import CheckpointError, read_checkpoint
from wsbcn_d2.checkpoint.files.pickles import Foreign, check_opcodes

CASES = int(os.environ.get("WSBCN_FUZZ_CASES", "100"))
fuzzed = settings(
    max_examples=CASES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@contextlib.contextmanager
def bounded(gigabytes=1.0, seconds=10.0):
    """No more address space than there is now and ``gigabytes``; no more time than ``seconds``."""
    with open("/proc/self/statm") as stream:
        now = int(stream.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    start = time.monotonic()
    resource.setrlimit(resource.RLIMIT_AS, (now + int(gigabytes * 2**30), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.monotonic() - start < seconds


def read(data, folder, name="file.pth"):
    """ "" if the bytes are read as a checkpoint, else the refusal."""
    path = folder / name
    path.write_bytes(data)
    try:
        with bounded(), warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            source = read_checkpoint(str(path))
    except CheckpointError as error:
        text = str(error)
        assert "\n" not in text and len(text) < 600 and str(path) in text
        assert "MemoryError" not in text, "it asked for more than there is"
        return text
    assert all(type(value) is torch.Tensor for value in source.state.values())
    return ""


def archive(pickled, entries=None, root="a/"):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names that stand twice
        out.writestr(root + "data.pkl", pickled)
        for name, data in (entries or {}).items():
            out.writestr(name, data)
    return stream.getvalue()


def refers(name, *arguments):
    """Opcodes that call a name with plain arguments."""
    module, _, name = name.rpartition(".")
    return f"c{module}\n{name}\n".encode() + pickle.dumps(arguments, 2)[2:-1] + b"R"


NESTED = b"(dK\x01\x85q\x00" + b"".join(
    b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60)
)  # ((((1,), (1,)), ...)
LISTS = b"}q\x00]q\x01" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(1, 60))
ONE = b"\x80\x02}X\x01\x00\x00\x00a"
CRAFTED = {
    "bytearray of 4 GB": ONE + refers("__builtin__.bytearray", 4 * 10**9) + b"s.",
    "bytes of 4 GB": ONE + refers("__builtin__.bytes", 4 * 10**9) + b"s.",
    "list of a range": ONE + refers("__builtin__.range", 10**9) + b"s.",
    "place 2^31 of the memo": ONE + b"r\xff\xff\xff\x7fK\x01s.",
    "place 2^70 of the memo": b"(dp1180591620717411303424\n.",
    "4 GB of bytes announced": ONE + b"\x8e\x00\x00\x00\x00\x01\x00\x00\x00abc" + b"s.",
    "4 GB of text announced": ONE + b"X\xff\xff\xff\xffabc" + b"s.",
    "a frame of 2^60 bytes": b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b"}.",
    "a nested pair as key": b"\x80\x02" + NESTED + b"K\x01s.",
    "a nested pair in a set": ONE + b"c__builtin__\nset\n" + NESTED[2:] + b"\x85\x85Rs.",
    "a nested pair to be printed": b"\x80\x02" + NESTED + b"R.",
    "nested lists to be printed": b"\x80\x02" + LISTS + b"K\x01R.",
    "100,000 tuples deep as key": b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"K\x01s.",
    "100,000 lists deep": ONE + b"]" * 100_000 + b"a" * 99_999 + b"s.",
    "numpy array of 8 TB": ONE + refers("numpy.zeros", (10**12,)) + b"s.",
    "numpy.ndarray called": ONE + refers("numpy.ndarray", (10**9,)) + b"s.",
    "torch.Tensor called": ONE + refers("torch.Tensor", 10**9) + b"s.",
    "torch.FloatStorage called": ONE + refers("torch.FloatStorage", 10**9) + b"s.",
    "torch.zeros": ONE + refers("torch.zeros", 10**9) + b"s.",
    "torch.load": ONE + refers("torch.load", "/etc/hostname") + b"s.",
    "torch.hub": ONE + refers("torch.hub.load", "x", "y") + b"s.",
    "torch.jit": ONE + refers("torch.jit._serialization.load", "x") + b"s.",
    "os.system": ONE + refers("os.system", "true") + b"s.",
    "posix.system": ONE + refers("posix.system", "true") + b"s.",
    "eval": ONE + refers("__builtin__.eval", "1") + b"s.",
    "getattr": ONE + refers("__builtin__.getattr", "a", "upper") + b"s.",
    "importlib": ONE + refers("importlib.import_module", "antigravity") + b"s.",
    "functools.partial": ONE + refers("functools.partial", 1) + b"s.",
    "instance by INST": b"(Vtrue\nios\nsystem\n.",
    "instance by OBJ": b"(cos\nsystem\nVtrue\no.",
    "an attribute set on a class": ONE + b"cnumpy\ndtype\n}X\x03\x00\x00\x00dtypeK\x01sbs.",
    "a slot set on a class": ONE + b"cnumpy\ndtype\nN}X\x08\x00\x00\x00__init__K\x01s\x86bs.",
    "a slot set on a function": ONE + b"c_codecs\nencode\nN}X\x01\x00\x00\x00xK\x01s\x86bs.",
    "a registered extension": ONE + b"\x82\x01s.",
    "data outside": ONE + b"X\x01\x00\x00\x00xQs.",
    "keys that are no text": b"\x80\x02}K\x01K\x02s.",
    "an int of 10^7 digits": b"(dI" + b"9" * 10**6 + b"\nI1\ns.",
    "nothing but STOP": b".",
    "no STOP": b"\x80\x02}",
    "stack underflow": b"\x80\x02ss.",
    "a mark and nothing": b"(.",
}


@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy"])
@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_pickles(kind, name, tmp_path):
    data = CRAFTED[name]
    if kind == "zip":
        data = archive(data)
    elif kind == "legacy":
        whole = io.BytesIO()
        torch.save({}, whole, _use_new_zipfile_serialization=False)
        empty = pickle.dumps({}, 2)
        assert whole.getvalue().count(empty) == 1
        data = whole.getvalue().replace(empty, data)
    assert read(data, tmp_path)


def passes(pickled):
    try:
        check_opcodes(io.BytesIO(pickled), len(pickled))
    except CheckpointError as error:
        assert "contain each other too many times" in str(error)
        return False
    return True


def test_how_deep_and_how_often_objects_may_contain_each_other():
    """Tuples 1,000 deep; 10,000,000 steps and 16 for each byte of the file."""
    assert passes(b"\x80\x02)" + b"\x85" * 999 + b".")
    assert not passes(b"\x80\x02)" + b"\x85" * 1000 + b".")
    value, levels = (), 0
    while passes(pickle.dumps(value, 2)):  # twice as many steps at each level
        value, levels = (value, value), levels + 1
    assert 2**levels - 1 <= 10_000_000 < 2 ** (levels + 1) - 1


def test_inert_objects_do_nothing():
    thing = Foreign(1, a=2)
    thing["x"] = 1
    thing.append(1)
    assert thing() is thing and vars(thing) == {}


def test_a_small_file_that_torch_gives_4_gigabytes_for(tmp_path):
    """The pickle of 363 bytes in a zip file, on torch's own restricted reader."""
    data = archive(CRAFTED["bytearray of 4 GB"], {"a/version": "3"})
    assert len(data) < 400
    (tmp_path / "bomb.pth").write_bytes(data)
    with pytest.raises((MemoryError, RuntimeError)), bounded():
        torch.load(tmp_path / "bomb.pth", weights_only=True)
    assert "not spelled out" in read(data, tmp_path)


GOOD = pickle.dumps({"conv1.weight": 1}, 2)
ARCHIVES = {
    "TorchScript": (archive(GOOD, {"a/constants.pkl": b"", "a/code/x.py": b""}), "TorchScript"),
    "TorchScript code alone": (archive(GOOD, {"a/code/__torch__.py": b"1"}), "TorchScript"),
    "names that differ in case": (archive(GOOD, {"a/data/x": b"1", "a/DATA/X": b"2"}), "one name"),
    "data.pkl twice": (archive(GOOD, {"A/DATA.PKL": GOOD}), "one name"),
    "two folders": (archive(GOOD, {"b/data.pkl": GOOD}), "without torch's data.pkl"),
    "big-endian": (archive(GOOD, {"a/byteorder": b"big"}), "big-endian"),
    "bytes before it": (b"PREFIX" * 9 + archive(GOOD), "not a tensor"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_crafted_archives(name, tmp_path):
    data, match = ARCHIVES[name]
    assert match in read(data, tmp_path)


def test_a_real_torchscript_file(tmp_path):
    module = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    torch.jit.save(module, str(tmp_path / "program.pth"))
    assert "TorchScript" in read((tmp_path / "program.pth").read_bytes(), tmp_path)


def test_one_damaged_byte_is_noticed(tmp_path):
    stream = io.BytesIO()
    torch.save({"conv1.weight": torch.arange(100.0)}, stream)
    data = bytearray(stream.getvalue())
    at = data.index(struct.pack("<f", 50.0))
    data[at + 1] ^= 1
    assert "damaged" in read(bytes(data), tmp_path)


def saved(state, **options):
    stream = io.BytesIO()
    torch.save(state, stream, **options)
    return stream.getvalue()


STATE = {"conv1.weight": torch.ones(2, 3), "bn1.bias": torch.ones(3, dtype=torch.float16)}
SOURCES = [
    saved(STATE),
    saved({"state_dict": STATE, "meta": {"ap": np.float64(1), "x": [1, (2, "a")]}}),
    saved(STATE, _use_new_zipfile_serialization=False),
    saved(STATE, _use_new_zipfile_serialization=False, pickle_protocol=4),
    saved(STATE, pickle_protocol=5),
    pickle.dumps({k: v.numpy() for k, v in STATE.items()}, 2),
    pickle.dumps({k: v.numpy() for k, v in STATE.items()}, 0),
    pickle.dumps({k: v.numpy() for k, v in STATE.items()}, 5),
    save_safetensors(STATE),
]


def test_the_sources_of_the_fuzzing_are_read(tmp_path):
    assert [read(data, tmp_path) for data in SOURCES] == [""] * len(SOURCES)


changes = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "cut", "insert", "drop", "copy"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
        st.binary(max_size=12),
    ),
    min_size=1,
    max_size=6,
)


@fuzzed
@given(source=st.sampled_from(SOURCES), how=changes)
def test_damaged_bytes(source, how, tmp_path_factory):
    data = bytearray(source)
    for what, where, value, more in how:
        at = int(where * len(data))
        if what in ("flip", "set") and data:
            data[at] = data[at] ^ (1 << value % 8) if what == "flip" else value
        elif what == "cut" and value < 64:
            del data[at:]
        elif what == "insert":
            data[at:at] = more
        elif what == "drop":
            del data[at : at + len(more)]
        elif what == "copy":
            data[at:at] = data[at // 2 : at // 2 + value]
    read(bytes(data), tmp_path_factory.getbasetemp())


NAMES = [
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3", "torch FloatStorage"),
    *("torch float32", "torch Size", "torch device", "torch.nn.parameter Parameter"),
    *("collections OrderedDict", "collections defaultdict", "numpy dtype", "numpy ndarray"),
    *("numpy.core.multiarray _reconstruct", "numpy.core.multiarray scalar", "_codecs encode"),
    *(
        "numpy.core.numeric _frombuffer",
        "__builtin__ set",
        "__builtin__ tuple",
        "argparse Namespace",
    ),
    *("__builtin__ getattr", "copy_reg _reconstructor", "mmengine.logging HistoryBuffer"),
    *("__builtin__ frozenset", "__builtin__ bytearray", "torch._tensor _rebuild_from_type_v2"),
]
ARGUMENTS = {
    "uint1": st.binary(min_size=1, max_size=1),
    "uint2": st.binary(min_size=2, max_size=2),
    "int4": st.binary(min_size=4, max_size=4),
    "uint4": st.sampled_from([b"\0\0\0\0", b"\1\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\x7f"]),
    "uint8": st.sampled_from([b"\0" * 8, b"\xff" * 8, b"\1" + b"\0" * 7]),
    "float8": st.binary(min_size=8, max_size=8),
    "decimalnl_short": st.sampled_from([b"1\n", b"-1\n", b"00\n", b"01\n", b"99999999999\n"]),
    "decimalnl_long": st.sampled_from([b"1L\n", b"-1\n"]),
    "floatnl": st.sampled_from([b"1.5\n", b"nan\n", b"x\n"]),
    "stringnl": st.sampled_from([b"'a'\n", b"'conv1_w'\n", b"a\n"]),
    "stringnl_noescape": st.sampled_from([b"a\n"]),
    "unicodestringnl": st.sampled_from([b"conv1_w\n", b"latin1\n", b"storage\n"]),
    "stringnl_noescape_pair": st.sampled_from(
        [n.replace(" ", "\n").encode() + b"\n" for n in NAMES]
    ),
    "string1": st.sampled_from([b"\1a", b"\x02f4", b"\xffa"]),
    "string4": st.sampled_from([b"\1\0\0\0a", b"\xff\xff\xff\xff"]),
    "unicodestring1": st.sampled_from([b"\1a", b"\x02f4"]),
    "unicodestring4": st.sampled_from([b"\1\0\0\0a", b"\7\0\0\0storage", b"\xff\xff\xff\x7f"]),
    "unicodestring8": st.sampled_from([b"\1" + b"\0" * 7 + b"a", b"\xff" * 8]),
    "bytes1": st.sampled_from([b"\1a", b"\4\0\0\x80\x3f"]),
    "bytes4": st.sampled_from([b"\4\0\0\0\0\0\x80\x3f", b"\xff\xff\xff\x7f"]),
    "bytes8": st.sampled_from([b"\4" + b"\0" * 7 + b"abcd", b"\xff" * 8]),
    "bytearray8": st.sampled_from([b"\4" + b"\0" * 7 + b"abcd", b"\xff" * 8]),
    "long1": st.sampled_from([b"\0", b"\x08" + b"\xff" * 7 + b"\x7f"]),
    "long4": st.sampled_from([b"\1\0\0\0\1", b"\xff\xff\xff\x7f"]),
}
# Operations that build twice as often as others.
OPERATIONS = [*pickletools.opcodes, *(op for op in pickletools.opcodes if op.stack_before)]


@st.composite
def programs(draw):
    """Pickles whose operations find what they need on the stack, mostly."""
    out, depth, marks = [b"\x80\x02}"], 1, []
    for _ in range(draw(st.integers(1, 40))):
        op = draw(st.sampled_from(OPERATIONS))
        before = len([o for o in op.stack_before if o.name not in ("mark", "stackslice")])
        marked = any(o.name == "mark" for o in op.stack_before)
        stray = draw(st.integers(0, 30)) == 0
        if op.name == "STOP" or not stray and (before > depth or marked and not marks):
            continue
        out.append(op.code.encode("latin1"))
        if op.arg is not None:
            out.append(draw(ARGUMENTS.get(op.arg.name, st.just(b"\0"))))
        if op.name == "MARK":
            marks.append(depth)
        elif marked and marks:
            depth = marks.pop()
        depth += len([o for o in op.stack_after if o.name != "mark"]) - before
    return b"".join(out) + b"."


@fuzzed
@given(program=programs(), tail=st.sampled_from([b"", b"X\1\0\0\0aK\1s.", b"."]))
def test_random_programs(program, tail, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    program = program[:-1] + tail if tail else program
    read(program, folder)
    read(archive(program, {"a/data/0": b"1234"}), folder)


entry_names = st.sampled_from(
    ["a/data/0", "a/data/1", "A/data/0", "a/version", "a/byteorder", "data.pkl", "b/data.pkl"]
    + ["../x", "/etc/x", "a/code/x", "a/constants.pkl", "a/.format_version", "a/data/../data/0"]
)


def storage_pickle(key, count, offset, size, stride):
    """data.pkl of one tensor with these claims."""

    class Out(pickle._Pickler):
        def persistent_id(self, obj):
            fits = isinstance(obj, str) and obj == "STORAGE"
            return ("storage", torch.FloatStorage, key, "cpu", count) if fits else None

    class Tensor:
        def __reduce__(self):
            arguments = ("STORAGE", offset, size, stride, False, None)
            return torch._utils._rebuild_tensor_v2, arguments

    stream = io.BytesIO()
    Out(stream, 2).dump({"conv1.weight": Tensor()})
    return stream.getvalue()


@pytest.mark.parametrize(
    "pid, message",
    [
        (("module", torch.FloatStorage, "0", "cpu", 4), "something other than a tensor's storage"),
        (("storage", torch.FloatStorage, "0", "cpu"), "something other than a tensor's storage"),
        (["storage", torch.FloatStorage, "0", "cpu", 4], "something other than a tensor's storage"),
        (("storage", "FloatStorage", "0", "cpu", 4), "a storage of unknown type or size"),
        (("storage", torch.FloatStorage, "0", "cpu", -4), "a storage of unknown type or size"),
        (("storage", torch.FloatStorage, "0", "cpu", 4.0), "a storage of unknown type or size"),
    ],
)
def test_references_to_what_is_no_storage(pid, message, tmp_path):
    class Out(pickle._Pickler):
        def persistent_id(self, obj):
            return pid if isinstance(obj, str) and obj == "STORAGE" else None

    stream = io.BytesIO()
    Out(stream, 2).dump({"conv1.weight": "STORAGE"})
    assert message in read(archive(stream.getvalue(), {"a/data/0": bytes(16)}), tmp_path)


numbers = st.sampled_from([0, 1, 2, 4, 10**6, 10**12, 2**31, 2**62, 2**63, 2**70, -1, -(2**63)])


@fuzzed
@given(
    entries=st.dictionaries(entry_names, st.binary(max_size=16), max_size=5),
    key=st.sampled_from(["0", "1", "../0", "", 0, None]),
    count=numbers,
    offset=numbers,
    size=st.lists(numbers, max_size=4).map(tuple),
    stride=st.lists(numbers, max_size=4).map(tuple),
    compression=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
)
def test_random_archives(entries, key, count, offset, size, stride, compression, tmp_path_factory):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as out:
        out.writestr("a/data.pkl", storage_pickle(key, count, offset, size, stride))
        for name, data in entries.items():
            out.writestr(name, data)
    read(stream.getvalue(), tmp_path_factory.getbasetemp())


values = st.recursive(
    st.none() | st.integers() | st.text(max_size=8) | st.sampled_from(["F32", "BF16", [0, 8]]),
    lambda v: (
        st.lists(v, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "weight_map", "x"]), v)
    ),
    max_leaves=8,
)


@fuzzed
@given(header=st.dictionaries(st.text(max_size=6), values, max_size=3), length=numbers)
def test_random_headers(header, length, tmp_path_factory):
    """Of safetensors files and of the index of shards."""
    folder = tmp_path_factory.getbasetemp()
    text = json.dumps(header).encode()
    for size in (len(text), length % 2**64):
        read(size.to_bytes(8, "little") + text + b"\0" * 16, folder)
    read(text, folder, "model.safetensors.index.json")
