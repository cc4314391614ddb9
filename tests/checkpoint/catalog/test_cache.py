"""The cache: private, verified, shared by processes, and whole whatever happens to a transfer."""

import contextlib
import hashlib
import multiprocessing
import os
import signal
import socket
import stat
import threading
import time
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer

from wsbcn_d2.checkpoint import CheckpointError, WSBCNCheckpointer, fetch
from wsbcn_d2.checkpoint.catalog import fetching, transfer
from wsbcn_d2.checkpoint.catalog.entries import Entry
from wsbcn_d2.files import PART_FILE, locked

from ..test_checkpointer import model
from .conftest import NAME, leftovers, resnet18


@pytest.fixture
def one(server, entry, good):
    """An entry whose only file the server has."""
    server.answers["/r18.pth"] = (200, {}, good)
    entry("/r18.pth")


def test_the_folder_is_private(one, cache):
    root = cache.parents[1]
    path = fetch(NAME)
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    for mode in (0o777, 0o770, 0o740, 0o720, 0o710, 0o704, 0o702, 0o701):
        root.chmod(mode)  # an older version's, or somebody's mistake
        assert fetch(NAME) == path and stat.S_IMODE(root.stat().st_mode) == 0o700


@pytest.mark.parametrize("kind", ["link", "file", "another user's", "unwritable"])
def test_there_is_no_other_cache_than_ones_own(kind, one, cache, server, tmp_path, monkeypatch):
    root = cache.parents[1]
    root.parent.mkdir(parents=True)
    if kind == "link":
        (tmp_path / "theirs").mkdir()
        root.symlink_to(tmp_path / "theirs")
    elif kind == "file":
        root.write_text("")
    elif kind == "another user's":
        root.mkdir()
        monkeypatch.setattr(os, "geteuid", lambda: root.stat().st_uid + 1)
    else:
        monkeypatch.setenv("FVCORE_CACHE", "/proc/cannot/be/made")
    with pytest.raises(CheckpointError, match="set FVCORE_CACHE to a folder of your own") as caught:
        fetch(NAME)
    assert "\n" not in str(caught.value) and server.log == []


def test_what_can_be_verified_comes_first(server, entry, cache, good, monkeypatch):
    digest = hashlib.sha256(good).hexdigest()[:8]
    for path in ("/plain.pth", f"/mirror-{digest}.pth"):
        server.answers[path] = (200, {}, good)
    entry("/plain.pth", f"/mirror-{digest}.pth")
    assert fetch(NAME).endswith(f"-mirror-{digest}.pth")
    assert server.log == [f"/mirror-{digest}.pth"]
    tried = []

    def download(url, path):
        tried.append(url)
        raise CheckpointError(f"{url}: no")

    monkeypatch.setattr(fetching, "download", download)
    with pytest.raises(CheckpointError, match="tried 3"):
        fetch("ImageNetPretrained/R-50-GN-WS")
    assert [url.split(":")[0] for url in tried] == ["https", "https", "http"]
    assert "resnet50_gn_ws-15beedd8" in tried[0]


@pytest.mark.parametrize("kind", [PART_FILE, "incoming"])
def test_what_a_killed_process_leaves_is_cleaned(kind, one, cache, good):
    cache.mkdir(parents=True)
    (cache / kind).write_bytes(good[:100])
    path = fetch(NAME)
    assert Path(path).read_bytes() == good and len(leftovers(cache)) == 1
    (cache / kind).write_bytes(good[:100])
    assert fetch(NAME) == path and len(leftovers(cache)) == 1


def raw_server(answer):
    """A socket that is given to ``answer`` for each connection; its URL."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                connection.recv(4096)
                with contextlib.suppress(OSError):
                    answer(connection)

    threading.Thread(target=serve, daemon=True).start()
    return listening, f"http://127.0.0.1:{listening.getsockname()[1]}/x.pth"


def stalls(connection):
    connection.sendall(b"HTTP/1.0 200 OK\r\n\r\nPK\x03\x04")
    time.sleep(3)


def trickles(connection):
    connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
    for _ in range(100):
        connection.sendall(b"P")
        time.sleep(0.05)


def pours(connection):
    connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
    for _ in range(1000):
        connection.sendall(b"P" * 10_000)


def breaks_off(connection):
    connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\nPK\x03\x04")


def talks_nonsense(connection):
    connection.sendall(b"\x00\x01 no http\r\n" * 10)


@pytest.mark.parametrize(
    "answer, match",
    [
        (stalls, "timed out"),
        (trickles, "too slow"),
        (pours, "more than 100000 bytes"),
        (breaks_off, "interrupted|IncompleteRead"),
        (talks_nonsense, "BadStatusLine|no http"),
    ],
)
def test_transfers_that_go_wrong(answer, match, entry, cache, monkeypatch):
    monkeypatch.setattr(transfer, "_TIMEOUT", 0.5)
    monkeypatch.setattr(transfer, "_LONGEST", 1)
    monkeypatch.setattr(transfer, "MAX_BYTES", 100_000)
    listening, url = raw_server(answer)
    with listening:
        entry()
        monkeypatch.setitem(
            fetching.CATALOG,
            NAME,
            type(fetching.CATALOG[NAME])(**{**vars(fetching.CATALOG[NAME]), "urls": (url,)}),
        )
        start = time.monotonic()
        with pytest.raises(CheckpointError, match=match) as caught:
            fetch(NAME)
    assert time.monotonic() - start < 10
    assert "\n" not in str(caught.value) and leftovers(cache) == []


class Response:
    """What urlopen gives: a few bytes at each read, as long as there are ``reads``."""

    def __init__(self, reads, **headers):
        self.reads, self.headers, self.url = reads, headers, "https://x/y.pth"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read1(self, size):
        assert 0 < size <= 1 << 24
        return next(self.reads, b"")


def test_the_limits_of_a_transfer(tmp_path, monkeypatch):
    """16 GiB, half a minute without a byte, an hour in all."""
    waited = []
    content = b"PK\x03\x04"

    def urlopen(request, timeout):
        waited.append(timeout)
        return Response(iter([content]))

    monkeypatch.setattr(transfer.urllib.request, "urlopen", urlopen)
    path = str(tmp_path / "part")
    assert transfer.download("https://x/y.pth", path) == hashlib.sha256(content).hexdigest()
    assert waited == [30] and Path(path).read_bytes() == content
    for announced, refused in ((2**34, False), (2**34 + 1, True)):
        message = "bytes announced" if refused else "interrupted"
        with pytest.raises(CheckpointError, match=message):
            transfer._receive(Response(iter([b"x"]), **{"Content-Length": str(announced)}), path)
    for seconds, refused in ((3600, False), (3601, True)):
        clock = iter([0.0, float(seconds)])
        monkeypatch.setattr(transfer.time, "monotonic", lambda clock=clock: next(clock))
        with (
            pytest.raises(CheckpointError, match="too slow")
            if refused
            else contextlib.nullcontext()
        ):
            transfer._receive(Response(iter([b"x"])), path)
    assert fetching._PATIENCE == 3600


def test_a_lock_that_is_never_given_back(one, cache, monkeypatch):
    monkeypatch.setattr(fetching, "_PATIENCE", 0.3)
    cache.mkdir(parents=True)
    with (
        locked(cache / "entry.lock"),
        pytest.raises(CheckpointError, match="another process has held .*entry.lock") as caught,
    ):
        fetch(NAME)
    assert "\n" not in str(caught.value)
    assert fetch(NAME)


def test_a_full_disk(one, cache, server):
    cache.mkdir(parents=True)
    part = cache / PART_FILE
    link = os.symlink
    unlink = os.unlink

    def keep(path, *args, **kwargs):  # the clean-up at the start would take the trap away
        unlink(path, *args, **kwargs)
        if os.fspath(path) == str(part) and not server.log:
            link("/dev/full", part)

    link("/dev/full", part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "unlink", keep)
        with pytest.raises(CheckpointError, match="No space left on device") as caught:
            fetch(NAME)
    assert "\n" not in str(caught.value)
    assert fetch(NAME)


def fetch_from(url, found):
    """In a process of its own."""
    values = vars(fetching.CATALOG["ImageNetPretrained/R-50-GN-WS"])
    fetching.CATALOG[NAME] = Entry(**{**values, "name": NAME, "urls": (url,)})
    found.put(fetch(NAME))


@pytest.mark.slow
def test_concurrent_processes_and_a_killed_one(server, cache, good):
    """One is killed in the middle of its download; of three others one downloads."""
    half = threading.Event()

    def answer(connection):
        connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + good[: len(good) // 2])
        half.set()
        time.sleep(20)

    listening, url = raw_server(answer)
    fork = multiprocessing.get_context("fork")
    found = fork.SimpleQueue()
    with listening:
        killed = fork.Process(target=fetch_from, args=(url, found))
        killed.start()
        assert half.wait(60)
        time.sleep(0.5)
        killed.kill()
        killed.join(10)
    assert killed.exitcode == -signal.SIGKILL
    assert not any(name.endswith(".pth") for name in leftovers(cache))
    server.answers["/r18.pth"] = (200, {}, good)
    url = f"{server.url}/r18.pth"
    children = [fork.Process(target=fetch_from, args=(url, found)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    paths = {found.get() for _ in children}
    assert len(paths) == 1 and Path(paths.pop()).read_bytes() == good
    assert server.log == ["/r18.pth"] and len(leftovers(cache)) == 1


@pytest.mark.parametrize("name", ["a#b-{0}.pth", "a?b-{0}.pth", "a%20b-{0}.pth"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_local_files_digest_is_read_off_its_name_as_it_is(
    name, whole, entry, good, tmp_path, monkeypatch, cache
):
    from urllib.parse import quote

    digest = hashlib.sha256(good).hexdigest()[:8] if whole else "00c0ffee"
    name = name.format(digest)
    folder = tmp_path / "have?a#b"
    folder.mkdir()
    (folder / name).write_bytes(good)
    entry("/" + quote(name))
    monkeypatch.setenv("WSBCN_CHECKPOINTS", str(folder))
    if whole:
        assert fetch(NAME) == str(folder / name)
    else:
        with pytest.raises(CheckpointError, match="its name says 00c0ffee"):
            fetch(NAME)


def test_stock_detectron2_gets_the_file_as_published(one, cache):
    """Its own checkpointer does not convert: it is told the names of the source."""
    path = fetch(NAME)
    assert set(torch.load(path, weights_only=True)["state_dict"]) == set(resnet18())
    with pytest.raises(Exception):  # noqa: B017
        DetectionCheckpointer(model("GN", "unbiased_std")).load(f"wsbcn://{NAME}")
    WSBCNCheckpointer(model("GN", "unbiased_std")).load(f"wsbcn://{NAME}")


def test_insisting_on_a_catalog_name(one, cache):
    with pytest.raises(CheckpointError, match=r"trained with WS formula.*\?insist=True"):
        WSBCNCheckpointer(model("GN", "none")).load(f"wsbcn://{NAME}")
    WSBCNCheckpointer(model("GN", "none")).load(f"wsbcn://{NAME}?insist=True")
