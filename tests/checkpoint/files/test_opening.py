"""Files that are not what they say: one-line errors, no code run, no output file."""

import collections
import hashlib
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from wsbcn_d2.checkpoint import CheckpointError, Options, convert, convert_file, read_checkpoint
from wsbcn_d2.checkpoint.files.archives import unpickled
from wsbcn_d2.checkpoint.files.opening import check_head, file_sha256
from wsbcn_d2.cli import convert as convert_command
from wsbcn_d2.cli.convert import main

from .. import source_models as src

ROOT = Path(__file__).resolve().parents[3]


def load_arrays(stream):
    return unpickled(stream, stream.getbuffer().nbytes)[0]


@pytest.fixture(scope="module")
def state():
    gn = src.resnet_entries(src.Net())
    return {name: torch.full(shape, 0.5) for name, shape in gn if not name.startswith("fc")}


@pytest.fixture(scope="module")
def good(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "R-50-GN-WS.pth.tar"
    torch.save({f"module.{k}": v for k, v in state.items()}, path)
    return path


def refused(path, match, tmp_path):
    """The reader refuses with one line that names the file, and nothing is written."""
    target = tmp_path / "out" / "target.pth"
    with pytest.raises(CheckpointError, match=match) as caught:
        convert_file(str(path), str(target))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not target.exists() and not list(tmp_path.glob("out/.part-*"))


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("legacy", [False, True])
def test_truncated(state, legacy, keep, tmp_path):
    buffer = io.BytesIO()
    small = dict(list(state.items())[:20])
    torch.save(small, buffer, _use_new_zipfile_serialization=not legacy)
    data = buffer.getvalue()
    path = tmp_path / "cut.pth"
    path.write_bytes(data[: int(len(data) * keep)])
    refused(path, "empty|cut short|damaged|more data than", tmp_path)


def test_truncated_pickle(tmp_path):
    data = pickle.dumps({"conv1_w": np.ones((64, 3, 7, 7), np.float32)})
    path = tmp_path / "cut.pkl"
    for size in (1, 20, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        refused(path, "damaged or cut short", tmp_path)


@pytest.mark.parametrize(
    "content, match",
    [
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"\n <HTML><body>moved</body>", "web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "server's error"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b'{"message": "Not Found"}', "JSON text"),
        (b"\x1f\x8b\x08\x00rest", "gzip"),
        (b"BZh91AY&SY", "bzip2"),
        (b"\xfd7zXZ\x00\x00\x04", "xz-compressed"),
        (b"\x00" * 257 + b"ustar" + b"\x00" * 200, "tar archive"),
        (b"GIF89a", "neither a torch file nor a pickle"),
        (b"\x00" * 4096, "neither a torch file nor a pickle"),
        (b"", "empty"),
    ],
)
def test_other_files(content, match, tmp_path):
    path = tmp_path / "page.pth"
    path.write_bytes(content)
    refused(path, match, tmp_path)


def test_missing_file_and_folder(tmp_path):
    refused(tmp_path / "absent.pth", "no such file", tmp_path)
    refused(tmp_path, "no such file", tmp_path)


def zip_with(path, records, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def storage_pickle(count, size=None):
    """data.pkl of a one-tensor file whose storage claims ``count`` floats."""
    out = io.BytesIO()

    class Fake(pickle._Pickler):
        def persistent_id(self, obj):
            is_storage = isinstance(obj, str) and obj == "STORAGE"
            return ("storage", torch.FloatStorage, "0", "cpu", count) if is_storage else None

    class Tensor:
        def __reduce__(self):
            shape = (count,) if size is None else size
            args = ("STORAGE", 0, shape, (1,) * len(shape), False, collections.OrderedDict())
            return torch._utils._rebuild_tensor_v2, args

    Fake(out, 2).dump({"conv1.weight": Tensor()})
    return out.getvalue()


@pytest.mark.parametrize("count", [10**6, 10**12, 10**18])
def test_absurd_storage_in_a_zip(count, tmp_path):
    path = tmp_path / "bomb.pth"
    zip_with(path, {"a/data.pkl": storage_pickle(count), "a/version": "3", "a/data/0": b"1234"})
    refused(path, "storage 0 should have", tmp_path)


def test_absurd_storage_in_the_old_format(tmp_path):
    good = io.BytesIO()
    torch.save({"conv1.weight": torch.ones(2)}, good, _use_new_zipfile_serialization=False)
    data = good.getvalue().replace(b"K\x02N", b"\x8a\x06" + (10**12).to_bytes(6, "little") + b"N")
    assert data != good.getvalue()
    path = tmp_path / "bomb.pth"
    path.write_bytes(data)
    refused(path, "more data than the file holds", tmp_path)


def test_a_storage_that_says_another_size_than_its_tensor(tmp_path):
    """In the old format both say it: the pickle's place, and eight bytes before the numbers."""
    good = io.BytesIO()
    torch.save({"conv1.weight": torch.ones(5)}, good, _use_new_zipfile_serialization=False)
    data, numbers = good.getvalue(), np.ones(5, "<f4").tobytes()
    for size in (0, 4, 6, 2**40):
        path = tmp_path / "other.pth"
        path.write_bytes(
            data.replace(struct.pack("<q", 5) + numbers, struct.pack("<q", size) + numbers)
        )
        assert path.read_bytes() != data
        refused(path, "damaged: storage .* has another size", tmp_path)


def test_compressed_and_overlapping_zip(tmp_path):
    path = tmp_path / "bomb.pth"
    zip_with(path, {"a/data.pkl": b"\0" * 10**7}, zipfile.ZIP_DEFLATED)
    refused(path, "compressed, which torch.save never does", tmp_path)
    zip_with(path, {"a/data.pkl": b"x" * 100})
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")  # the central directory's sizes
    struct.pack_into("<II", data, at + 20, 2**31, 2**31)
    path.write_bytes(data)
    refused(path, "more data than the file holds", tmp_path)
    zip_with(path, {"word/document.xml": "a docx"})
    refused(path, "without torch's data.pkl", tmp_path)


def test_expanded_tensor(tmp_path):
    """A stride of 0 makes terabytes out of four bytes."""
    path = tmp_path / "wide.pth"
    torch.save({"conv1.weight": torch.ones(1).expand(10**12)}, path)
    refused(path, "too little data", tmp_path)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


@pytest.mark.parametrize("kind", ["torch", "legacy", "pickle", "protocol0", "in meta"])
def test_code_in_a_pickle_does_not_run(kind, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "evil.pth"
    evil = Evil(str(marker))
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"conv1_w": evil}))
    elif kind == "protocol0":
        path.write_bytes(b"(dp0\nVconv1_w\np1\ncposix\nsystem\n(Vtouch " + str(marker).encode())
        path.write_bytes(path.read_bytes() + b"\ntRs.")
    elif kind == "in meta":
        torch.save({"state_dict": {"conv1.weight": torch.ones(1)}, "meta": {"hook": evil}}, path)
    else:
        data = {"conv1.weight": evil}
        torch.save(data, path, _use_new_zipfile_serialization=kind == "torch")
    refused(path, "only (tensors|numpy arrays) and plain", tmp_path)
    assert not marker.exists()
    # The file is a working exploit: unpickled naively it does run.
    if kind == "pickle":
        pickle.loads(path.read_bytes())
        assert marker.exists()


def numpy_reduce(*args):
    class Reduced:
        def __reduce__(self):
            return args

    return Reduced()


def test_arrays_with_false_headers(tmp_path):
    reconstruct = np.zeros(1).__reduce__()[0]
    path = tmp_path / "a.pkl"

    def array(shape, dtype, raw):
        return numpy_reduce(reconstruct, (np.ndarray, (0,), b"b"), (1, shape, dtype, False, raw))

    for fake, match in (
        (array((10**12,), np.dtype("f4"), b"1234"), "4 bytes of data"),
        (array((-1,), np.dtype("f4"), b"1234"), "shape"),
        (array((1,), np.dtype("O"), [1]), "not numeric"),
        (array((1,), np.dtype([("a", "f4")]), b"1234"), "not numeric|dtype"),
        (array((1,), "f4", b"1234"), "malformed header"),
        (numpy_reduce(np.zeros, (10**12,)), "numpy.zeros|numpy.*zeros"),
        (numpy_reduce(np.memmap, ("x",)), "numpy.*memmap"),
    ):
        path.write_bytes(pickle.dumps({"conv1_w": fake}, protocol=2))
        refused(path, match, tmp_path)


def test_shared_lists_do_not_blow_up(tmp_path):
    value = []
    for _ in range(60):
        value = [value, value]
    assert len(load_arrays(io.BytesIO(pickle.dumps({"x": value})))) == 1
    loop = []
    loop.append(loop)
    path = tmp_path / "loop.pkl"
    path.write_bytes(pickle.dumps(loop))
    refused(path, "holds a list", tmp_path)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_arrays_of_every_protocol(protocol):
    arrays = {
        "f": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "big": np.arange(3, dtype=">i4"),
        "half": np.ones(2, np.float16),
        "scalar": np.float64(2.5),
        "zero": np.array(7, np.int64),
        "nested": collections.OrderedDict(a=[np.ones(1), ("text", 1, None, {2.0})]),
    }
    got = load_arrays(io.BytesIO(pickle.dumps(arrays, protocol=protocol)))
    for name in ("f", "big", "half", "zero"):
        assert np.array_equal(got[name], arrays[name]) and got[name].shape == arrays[name].shape
        assert got[name].dtype.isnative and got[name].flags.c_contiguous
    assert got["scalar"] == 2.5 and got["nested"]["a"][1] == ("text", 1, None, {2.0})


def test_python2_pickle(tmp_path):
    """Detectron's files: protocol 2 of Python 2, arrays as byte strings."""
    raw = np.array([1.5, -2.0], "<f4").tobytes()
    data = b"\x80\x02}q\x00U\x07conv1_wq\x01cnumpy.core.multiarray\n_reconstruct\n"
    data += b"q\x02cnumpy\nndarray\n"
    data += (
        b"q\x03K\x00\x85U\x01bq\x04\x87Rq\x05(K\x01K\x02\x85cnumpy\ndtype\nq\x06U\x02f4K\x00K\x01"
    )
    data += b"\x87Rq\x07(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08" + raw
    data += b"tbs."
    assert load_arrays(io.BytesIO(data))["conv1_w"].tolist() == [1.5, -2.0]


def test_numpy_scalars_beside_the_weights(state, tmp_path):
    path = tmp_path / "m.pth"
    torch.save({"state_dict": state, "meta": {"ap": np.float64(0.4), "epoch": 24}}, path)
    assert len(read_checkpoint(str(path)).state) == len(state)


@pytest.mark.parametrize(
    "content, match",
    [
        ([1, 2], "holds a list"),
        ({}, "no parameters"),
        ({"epoch": 3, "conv1.weight": torch.ones(1)}, "entry epoch is a int"),
        ({1: torch.ones(1)}, "not names"),
        ({"a.weight": torch.ones(1)}, "fit no known format"),
        ({"module.x": torch.ones(1), "x": torch.ones(1)}, "same parameter"),
        ({"s": torch.eye(3).to_sparse()}, "sparse|refuses|only tensors"),
    ],
)
def test_other_contents(content, match, tmp_path):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    refused(path, match, tmp_path)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda s: s.pop("layer3.2.bn2.bias"), "1 parameters are missing: res4.2.conv2.norm.bias"),
        (lambda s: s.update({"layer5.0.x": torch.ones(1)}), "1 keys are unknown.*layer5.0.x"),
        (lambda s: s.update({"layer1.3.conv1.weight": torch.ones(1)}), "no known ResNet has"),
        (
            lambda s: s.update(
                {"layer2.0.conv3.weight": s["layer2.0.conv3.weight"].transpose(0, 1)}
            ),
            r"res3.0.conv3.weight is \(128, 512, 1, 1\) instead of \(512, 128, 1, 1\)",
        ),
        (
            lambda s: s.update({"layer1.0.conv2.weight": torch.zeros(48, 48, 3, 3)}),
            "no known ResNet or ResNeXt",
        ),
        (lambda s: s.update({"gn1.weight": torch.ones(64)}), "both mean stem.conv1.norm.weight"),
    ],
)
def test_missing_extra_and_transposed(state, change, match):
    damaged = dict(state)
    change(damaged)
    with pytest.raises(CheckpointError, match=match):
        convert(damaged)


@pytest.mark.parametrize(
    "key, match",
    [
        ("patch_embed.backbone.stages.0.blocks.0.conv1.weight", "pre-activation"),
        ("stages.0.blocks.0.conv1.weight", "pre-activation"),
        ("stages.0.0.conv1.gain", "NFNets"),
        ("aspp.conv1.weight", "ASPP"),
        ("decoder.aspp.conv1.weight", "ASPP"),
        ("layer1.0.conv1.weight_gamma", "ConvAWS"),
        ("layer1.0.conv1.weight_beta", "ConvAWS"),
        ("bbox_head.retina_cls.weight", "one-stage"),
        ("backbone.body.stem.conv1.weight", "maskrcnn-benchmark"),
    ],
)
def test_known_but_not_convertible(key, match):
    with pytest.raises(CheckpointError, match=match):
        convert({key: torch.ones(1)})


def test_nan_is_reported(state):
    broken = dict(state)
    broken["layer1.0.conv1.weight"] = torch.full((64, 64, 1, 1), float("nan"))
    broken["bn1.bias"] = torch.full((64,), float("inf"))
    report = convert(broken)[1]
    names = {"backbone.bottom_up.res2.0.conv1.weight", "backbone.bottom_up.stem.conv1.norm.bias"}
    assert set(report.nonfinite) == names
    assert any("NaN or Inf in 2 tensors" in line for line in report.lines())
    assert not convert(state)[1].nonfinite
    for value in (float("nan"), float("inf"), -float("inf")):  # one number among many
        broken = dict(state)
        broken["conv1.weight"] = state["conv1.weight"].clone()
        broken["conv1.weight"][3, 1, 2, 2] = value
        assert convert(broken)[1].nonfinite == ["backbone.bottom_up.stem.conv1.weight"]


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**20 + 1, 3 * 2**20 - 1])
def test_the_digest_is_of_the_whole_file(size, tmp_path):
    data = np.random.default_rng(size).bytes(size)
    (tmp_path / "a").write_bytes(data)
    assert file_sha256(str(tmp_path / "a")) == hashlib.sha256(data).hexdigest()


def test_the_largest_file(tmp_path):
    path = tmp_path / "huge.pth"
    path.write_bytes(b"PK")
    os.truncate(path, 2**34)  # without a byte on the disk
    assert check_head(str(path)).startswith(b"PK\0")
    os.truncate(path, 2**34 + 1)
    with pytest.raises(CheckpointError, match="larger than 16 GiB"):
        check_head(str(path))


@pytest.mark.parametrize("target", ["fpn", "c4", "resnet"])
def test_bare_names_alone_are_to_be_matched(target, good, tmp_path):
    convert_file(str(good), str(tmp_path / "a.pth"), Options(target=target))
    data = torch.load(tmp_path / "a.pth", weights_only=True)
    assert data.get("matching_heuristics", False) == (target == "resnet")
    assert ("stem.conv1.weight" in data["model"]) == (target == "resnet")


TOOL = ROOT / "tools/convert_checkpoint.py"


def run_tool(capsys, *args):
    """The tool's exit status and output, in this process."""
    try:
        status = main([str(arg) for arg in args])
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], {}),
        (["--to", "c4"], {"target": "c4"}),
        (["--format", "mmdet"], {"format": "mmdet"}),
        (["--norm", "BN"], {"norm": "BN"}),
        (["--formula", "biased"], {"formula": "biased"}),
    ],
)
@pytest.mark.parametrize("target", [None, "b.pth"])
def test_what_is_asked_of_the_conversion(words, expected, target, monkeypatch, capsys):
    asked = []

    class Report:
        def lines(self):
            return ["one", "two"]

    monkeypatch.setattr(convert_command, "convert_file", lambda *a: asked.append(a) or Report())
    status, said, _ = run_tool(capsys, "a.pth", *[target] * bool(target), *words)
    assert status == 0 and asked == [("a.pth", target, Options(**expected))]
    assert said == "one\ntwo\n" + "written       b.pth\n" * bool(target)


def test_a_file_is_not_converted_onto_itself(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convert_command, "convert_file", lambda *a: pytest.fail("converted"))
    path, link = tmp_path / "a.pth", tmp_path / "b.pth"
    path.write_bytes(b"x")
    link.symlink_to(path)
    for target in (path, link, tmp_path / "." / "a.pth"):
        status, _, error = run_tool(capsys, path, target)
        assert status == 2 and "source and target are the same file" in error


@pytest.mark.slow
def test_tool(good, tmp_path, capsys):
    target = tmp_path / "new" / "R-50.pth"
    command = [sys.executable, str(TOOL), str(good), str(target)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    for text in (
        "imagenet, bare state dict",
        "R-50",
        "159 in, 159 mapped, 0 dropped",
        "unbiased_std",
        "(123.675, 116.28, 103.53)",
        'MODEL.WS.FORMULA: "unbiased_std"',
        "note          'module.' removed",
    ):
        assert text in done.stdout
    data = torch.load(target, weights_only=True)
    assert set(data) == {"model", "wsbcn_d2"} and len(data["model"]) == 159
    assert "backbone.bottom_up.res5.2.conv3.norm.bias" in data["model"]
    meta = data["wsbcn_d2"]
    assert meta["norm"] == "GN" and meta["ws_formula"] == "unbiased_std" and meta["ws_eps"] == 1e-5
    assert meta["source"] == "R-50-GN-WS.pth.tar" and len(meta["source_sha256"]) == 64

    before = target.read_bytes()
    good_bytes = good.read_bytes()
    cut = tmp_path / "cut.pth"
    cut.write_bytes(good_bytes[:-1000])
    status, _, error = run_tool(capsys, cut, target)
    assert status == 2 and len(error.splitlines()) == 1 and "cut.pth" in error
    assert target.read_bytes() == before, "the old file stays whole"
    assert run_tool(capsys, good, good)[0] == 2 and good.read_bytes() == good_bytes


def test_bare_names_and_reading_our_own_files(good, tmp_path):
    target = tmp_path / "bare.pth"
    convert_file(str(good), str(target), Options(target="resnet", formula="biased"))
    data = torch.load(target, weights_only=True)
    assert data["matching_heuristics"] is True and "stem.conv1.weight" in data["model"]
    again = tmp_path / "again.pth"
    report = convert_file(str(target), str(again))
    assert report.format == "detectron2" and report.metadata.format == "imagenet"
    assert report.metadata.ws_formula == "biased", "what was recorded is kept"
    assert report.metadata.source == "R-50-GN-WS.pth.tar"
    digest = hashlib.sha256(good.read_bytes()).hexdigest()
    assert report.metadata.source_sha256 == digest, "the original's, not the converted file's"
    mode = again.stat().st_mode & 0o777
    plain = tmp_path / "plain"
    plain.write_text("")
    assert mode == plain.stat().st_mode & 0o777, "not a private file"
