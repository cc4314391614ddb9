"""A catalog entry of a small network, a cache, and a server on this machine."""

import http.server
import io
import threading

import pytest
import torch

from wsbcn_d2.checkpoint import CATALOG
from wsbcn_d2.checkpoint.catalog.entries import Entry
from wsbcn_d2.checkpoint.metadata import IMAGENET_RGB

from ..torchvision_names import basic_resnet

NAME = "ImageNetPretrained/test"


def resnet18(value=0.5, dtype=torch.float16):
    """A GN R-18 in torchvision's names."""
    return {name: torch.full(shape, value, dtype=dtype) for name, shape in basic_resnet().items()}


def packed(data):
    buffer = io.BytesIO()
    torch.save(data, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def good():
    return packed({"state_dict": resnet18()})


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by path; what was asked for is kept in ``server.log``."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.log.append(self.path)
        status, headers, body = self.server.answers.get(self.path, (404, {}, b"gone"))
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            if value is not None:
                self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.answers, running.log = {}, []
        running.url = f"http://127.0.0.1:{running.server_address[1]}"
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join(10)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("WSBCN_CHECKPOINTS", raising=False)
    return tmp_path / "cache" / "wsbcn_d2" / "ImageNetPretrained" / "test"


@pytest.fixture
def entry(monkeypatch, server):
    def put(*paths, **changes):
        urls = tuple(f"{server.url}{path}" for path in paths)
        values = dict(norm="GN", formula="unbiased_std", pixels=IMAGENET_RGB, detector=False)
        values |= dict(licence="not stated", score="none") | changes
        monkeypatch.setitem(CATALOG, NAME, Entry(name=NAME, urls=urls, **values))

    return put


def leftovers(cache):
    return sorted(p.name for p in cache.glob("*") if not p.name.endswith(".lock"))
