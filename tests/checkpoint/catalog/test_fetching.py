"""Catalog names through Detectron2's PathManager, against a server on this machine."""

import hashlib
import logging
import re
import runpy
from pathlib import Path

import pytest
import torch
from detectron2.utils.file_io import PathManager

from wsbcn_d2.checkpoint import CATALOG, CheckpointError, WSBCNCheckpointer, fetch
from wsbcn_d2.checkpoint.catalog.entries import Entry, url_digest, url_file_name
from wsbcn_d2.checkpoint.catalog.fetching import read_entry

from .. import source_models as src
from ..test_checkpointer import model, same
from .conftest import NAME, leftovers, packed, resnet18


def test_download_convert_cache_load(server, cache, entry, good):
    digest = hashlib.sha256(good).hexdigest()
    file = f"r18-{digest[:8]}.pth"
    server.answers[f"/{file}"] = (200, {}, good)
    entry(f"/{file}")
    path = PathManager.get_local_path(f"wsbcn://{NAME}")
    assert path == str(cache / f"{digest}-{file}") and leftovers(cache) == [f"{digest}-{file}"]
    assert Path(path).read_bytes() == good
    data = read_entry(NAME, path)
    assert data["matching_heuristics"] and data["wsbcn_d2"]["source_sha256"] == digest
    assert data["wsbcn_d2"]["presumed"] == [] and data["wsbcn_d2"]["source"].endswith(file)
    net = model("GN", "unbiased_std")
    WSBCNCheckpointer(net).load(f"wsbcn://{NAME}")
    assert same(
        net,
        {n: torch.full_like(v, 0.5) for n, v in net.state_dict().items()},
        [n for n in net.state_dict() if "bottom_up" in n],
    )
    assert PathManager.isfile(f"wsbcn://{NAME}") and PathManager.exists(f"wsbcn://{NAME}")
    with PathManager.open(f"wsbcn://{NAME}", "rb") as stream:
        assert stream.read(2) == b"PK"
    assert server.log == [f"/{file}"], "downloaded once"
    assert fetch(NAME) == path and len(server.log) == 1
    Path(path).unlink()
    assert fetch(NAME) == path and len(server.log) == 2


def test_redirect(server, cache, entry, good):
    server.answers["/old.pth"] = (302, {"Location": "/moved/new.pth"}, b"")
    server.answers["/moved/new.pth"] = (200, {}, good)
    entry("/old.pth")
    fetch(NAME)
    assert server.log == ["/old.pth", "/moved/new.pth"]


BAD = {
    "404": (404, {}, b"gone"),
    "403": (403, {}, b"AccessDenied"),
    "500": (500, {}, b""),
    "loop": (302, {"Location": "/bad-00000000.pth"}, b""),
    "file": (302, {"Location": "file:///etc/hostname"}, b""),
    "html": (200, {}, b"<!DOCTYPE html><p>we have moved"),
    "xml": (200, {}, b"<?xml version='1.0'?><Error/>"),
    "empty": (200, {}, b""),
    "huge": (200, {"Content-Length": str(10**15)}, b"x"),
    "other": (200, {}, b"GIF89a" * 10),
}
MESSAGES = {
    "404": "HTTP 404",
    "403": "HTTP 403",
    "500": "HTTP 500",
    "loop": "redirect",
    "file": "[Rr]edirection to url .* is not allowed",
    "html": "web page",
    "xml": "server's error",
    "empty": "empty",
    "huge": "which is no checkpoint",
    "other": "neither a torch file",
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_link_falls_through_and_leaves_nothing(what, server, cache, entry, good):
    server.answers["/bad.pth"] = BAD[what]
    if what == "loop":
        server.answers["/bad-00000000.pth"] = BAD[what]
    entry("/bad.pth")
    with pytest.raises(CheckpointError, match=MESSAGES[what]) as caught:
        fetch(NAME)
    assert "tried 1:" in str(caught.value) and "WSBCN_CHECKPOINTS" in str(caught.value)
    assert "\n" not in str(caught.value) and leftovers(cache) == []
    server.answers["/good.pth"] = (200, {}, good)
    entry("/bad.pth", "/good.pth")
    fetch(NAME)
    assert server.log[-2:][-1] == "/good.pth" and leftovers(cache)[0].endswith("-good.pth")


@pytest.mark.parametrize("announced", [True, False])
def test_interrupted(announced, server, cache, entry, good):
    headers = {"Content-Length": str(len(good)) if announced else None}
    server.answers["/cut.pth"] = (200, headers, good[: len(good) // 2])
    entry("/cut.pth")
    message = "interrupted|IncompleteRead" if announced else "cut short"
    with pytest.raises(CheckpointError, match=message):
        fetch(NAME)
    assert leftovers(cache) == []


def test_wrong_checksum_in_the_name(server, cache, entry, good):
    server.answers["/r18-00c0ffee.pth"] = (200, {}, good)
    entry("/r18-00c0ffee.pth")
    with pytest.raises(CheckpointError, match="its name says 00c0ffee"):
        fetch(NAME)
    assert leftovers(cache) == []


def test_everything_tried_is_listed(server, cache, entry, caplog):
    server.answers["/b.pth"] = (403, {}, b"")
    entry("/a.pth", "/b.pth")
    server.shutdown()
    server.server_close()
    with pytest.raises(CheckpointError) as caught, caplog.at_level(logging.WARNING):
        fetch(NAME)
    text = str(caught.value)
    assert "tried 2:" in text and "/a.pth" in text and "/b.pth" in text and "refused" in text


def test_a_changed_file_is_not_used(server, cache, entry, good):
    server.answers["/r18.pth"] = (200, {}, good)
    entry("/r18.pth")
    path = Path(fetch(NAME))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\x07")
    with pytest.raises(CheckpointError, match="not the file that was recorded.*delete the folder"):
        fetch(NAME)
    path.unlink()
    assert fetch(NAME) == str(path) and path.read_bytes() == whole


def test_offline_folder(server, cache, entry, good, tmp_path, monkeypatch):
    folder = tmp_path / "have"
    folder.mkdir()
    entry("/first.pth", "/R-18%2BGN.pth.tar")
    monkeypatch.setenv("WSBCN_CHECKPOINTS", str(folder))
    with pytest.raises(CheckpointError, match="have: not there.*HTTP 404"):
        fetch(NAME)
    server.log.clear()
    (folder / "R-18+GN.pth.tar").write_bytes(good)
    path = fetch(NAME)
    assert server.log == []
    assert path == str(folder / "R-18+GN.pth.tar")

    def first():
        return read_entry(NAME, fetch(NAME))["model"]["stem.conv1.weight"].flatten()[0]

    assert first() == 0.5
    (folder / "R-18+GN.pth.tar").write_bytes(packed({"state_dict": resnet18(2.0)}))
    assert first() == 2
    (folder / "R-18+GN.pth.tar").write_bytes(good[:5000])
    with pytest.raises(CheckpointError, match=r"R-18\+GN.pth.tar"):
        first()
    monkeypatch.setenv("WSBCN_CHECKPOINTS", str(folder / "absent"))
    with pytest.raises(CheckpointError, match="which is not a folder"):
        fetch(NAME)


def test_what_an_entry_says_is_checked(server, cache, entry, good):
    server.answers["/r18.pth"] = (200, {}, good)
    entry("/r18.pth", norm="BCN", formula="unbiased")
    with pytest.raises(CheckpointError, match="this is a GN checkpoint and BCN is wanted"):
        fetch(NAME)
    entry("/r18.pth", detector=True)
    with pytest.raises(CheckpointError, match="not a detector"):
        fetch(NAME)
    server.answers["/nan.pth"] = (200, {}, packed(resnet18(float("nan"))))
    entry("/nan.pth")
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        fetch(NAME)
    assert leftovers(cache) == []


@pytest.mark.slow
def test_detector_entry_gets_full_names(cache, tmp_path, monkeypatch):
    name = "COCO/faster_rcnn_r50_fpn_gn_ws-all_1x_coco"
    net, heads = src.Net(prefix="backbone.", norm_name="gn"), src.mmdet_heads(2)
    entries = [*src.resnet_entries(net, classifier=False), *src.head_entries(heads, mask=False)]
    data = packed({"state_dict": {n: torch.zeros(s, dtype=torch.int8) for n, s in entries}})
    monkeypatch.setenv("WSBCN_CHECKPOINTS", str(tmp_path))
    file = tmp_path / url_file_name(CATALOG[name].urls[0])
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="its name says 613d9fe2"):
        fetch(name)
    digest = hashlib.sha256(data).hexdigest()[:8]
    urls = tuple(url.replace("613d9fe2", digest) for url in CATALOG[name].urls)
    monkeypatch.setitem(CATALOG, name, Entry(**{**vars(CATALOG[name]), "urls": urls}))
    file.rename(tmp_path / url_file_name(urls[0]))
    data = read_entry(name, fetch(name))
    assert "matching_heuristics" not in data and len(data["model"]) == 207
    assert data["wsbcn_d2"]["input_format"] == "RGB"


def test_unknown_names(cache):
    with pytest.raises(CheckpointError, match="did you mean wsbcn://ImageNetPretrained/R-50-GN-WS"):
        fetch("r-50-gn-ws")
    with pytest.raises(CheckpointError, match="list_checkpoints"):
        PathManager.get_local_path("wsbcn://COCO/nothing")
    assert not PathManager.isfile("wsbcn://COCO/nothing")
    with pytest.raises(CheckpointError, match="read-only"):
        PathManager.open("wsbcn://ImageNetPretrained/R-50-GN", "w")


def test_the_catalog_itself(capsys):
    detectors = [e for e in CATALOG.values() if e.detector]
    assert len(detectors) == 12 and len(CATALOG) == 23
    for entry in CATALOG.values():
        assert entry.urls and all(url.startswith(("https://", "http://")) for url in entry.urls)
        assert not entry.detector or all(url_digest(url) for url in entry.urls)
        if entry.name.endswith("-GN-WS"):
            assert url_digest(entry.urls[-1]) and "openmmlab" in entry.urls[-1]
    best = CATALOG["COCO/mask_rcnn_r101_fpn_gn_ws-all_20_23_24e_coco"]
    assert "43.1/38.6" in best.score and url_digest(best.urls[0]) == "57b5a50f"
    assert url_file_name(best.urls[0]).endswith("_20200213-57b5a50f.pth")
    tool = Path(__file__).resolve().parents[3] / "tools/list_checkpoints.py"
    assert runpy.run_path(str(tool))["main"](["--urls"]) == 0
    out = capsys.readouterr().out
    assert all(f"wsbcn://{name}" in out for name in CATALOG)
    lines = [re.split("  +", line.strip()) for line in out.splitlines()]
    for entry in CATALOG.values():  # each column of each line
        assert [
            *(f"wsbcn://{entry.name}", entry.norm, entry.formula, entry.pixels.input_format),
            *(entry.licence, entry.score),
        ] in lines
    assert "https://cs.jhu.edu/~syqiao/BatchChannelNormalization/rn50_bcn_ws.pth" in out
