"""One file from one URL: complete and checked, or an error and nothing left behind."""

import hashlib
import http.client
import logging
import time
import urllib.error
import urllib.request

from ..errors import CheckpointError, naming
from ..files.opening import MAX_BYTES, check_head
from .entries import url_digest

_TIMEOUT = 30  # seconds without a byte
_LONGEST = 3600  # seconds in all
_BLOCK = 1 << 20


def download(url: str, path: str) -> str:
    """Downloads to a path of the caller's choosing, a temporary name.

    Returns:
        hexadecimal SHA-256 of the file.

    Raises:
        CheckpointError: refused by the server, interrupted, of another length than announced,
            of another digest than the name says, or not a checkpoint at all (a web page).
    """
    logging.getLogger(__name__).info("Downloading %s", url)
    request = urllib.request.Request(url, headers={"User-Agent": "wsbcn_d2"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            digest = _receive(response, path)
    except urllib.error.HTTPError as err:
        raise CheckpointError(f"{url}: HTTP {err.code} {err.reason}") from err
    except (urllib.error.URLError, http.client.HTTPException, OSError) as err:
        reason = getattr(err, "reason", None) or err
        raise CheckpointError(f"{url}: {type(err).__name__} {reason}") from err
    with naming(url):
        check_head(path)
    expected = url_digest(url)
    if expected and not digest.startswith(expected):
        raise CheckpointError(f"{url}: SHA-256 {digest[:8]}..., its name says {expected}")
    return digest


def _receive(response, path):
    announced = response.headers.get("Content-Length")
    announced = int(announced) if announced and announced.isdigit() else None
    if announced and announced > MAX_BYTES:
        raise CheckpointError(
            f"{response.url}: {announced} bytes announced, which is no checkpoint"
        )
    digest, received, deadline = hashlib.sha256(), 0, time.monotonic() + _LONGEST
    with open(path, "wb") as out:
        while block := response.read1(_BLOCK):  # what has come: else a trickle is never looked at
            received += len(block)
            if received > MAX_BYTES:
                raise CheckpointError(f"{response.url}: more than {MAX_BYTES} bytes")
            if time.monotonic() > deadline:
                raise CheckpointError(f"{response.url}: {received} bytes in {_LONGEST} s: too slow")
            digest.update(block)
            out.write(block)
    if announced is not None and received != announced:
        raise CheckpointError(f"{response.url}: {received} of {announced} bytes: interrupted")
    return digest.hexdigest()
