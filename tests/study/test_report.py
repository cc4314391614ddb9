"""The report: whole in itself, and a browser without a network shows all of it."""

import base64
import io
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from wsbcn_d2.study import write_report

from .helpers import make_record

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
RED, TEAL = (230, 10, 10), (10, 200, 200)


@pytest.fixture
def study(tmp_path):
    """A folder with a report of 2 variants x 2 numbers of images x 3 seeds, and pictures."""
    records = [
        make_record(
            variant, images, seed, box=base + seed, settings={"MODEL.FPN.NORM": variant.upper()}
        )
        for images in (1, 2)
        for variant, base in (("gn", 40.0), ("bcn_ws", 50.0))
        for seed in (1, 2, 3)
    ]
    for record in records[::3]:
        folder = tmp_path / "runs" / f"name_{record['digest']}" / "predictions"
        folder.mkdir(parents=True)
        pixels = np.full((90, 208, 3), 255, np.uint8)
        pixels[:, :100], pixels[:, 108:] = TEAL, RED
        Image.fromarray(pixels).save(folder / "000.png")
    path = write_report(
        records,
        tmp_path,
        title="GN < BCN & WS",
        command="python tools/compare.py --seeds 1 2 3",
        missing=["bn_1img_seed1: exit code 1: <nan>"],
    )
    return path, path.read_text(), records


def test_nothing_is_loaded_from_elsewhere(study):
    _, page, _ = study
    assert "<script" not in page and "<link" not in page and "@import" not in page
    sources = re.findall(r'(?:src|href)="([^"]{0,20})', page)
    assert len(sources) == 5 + 5  # figures; truth and four columns of pictures
    assert all(source.startswith("data:image/") for source in sources)
    assert "url(" not in page


def test_pictures_are_the_halves_of_what_a_run_has_drawn(study):
    _, page, _ = study
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)', page)
    for content, color in zip(found, [TEAL, *[RED] * 4], strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))).astype(int)
        assert pixels.shape == (90, 100, 3)  # without the gap between them, up to the edges
        assert np.abs(pixels - color).max() <= 12


def test_what_it_says(study):
    _, page, _ = study
    assert "GN &lt; BCN &amp; WS" in page and "&lt;nan&gt;" in page
    assert "42.0 ± 2.5" in page  # 41, 42, 43: 4.3027 / sqrt(3)
    assert "<td>bcn_ws - gn</td><td>2</td><td>+10.0 ± 0.0</td>" in page
    assert "<td>bcn_ws is ahead in box AP and mask AP</td>" in page
    assert "<td>MODEL.FPN.NORM</td><td>GN</td><td>BCN_WS</td>" in page
    assert "python tools/compare.py --seeds 1 2 3" in page
    assert "a processor, 2 cores, 1 thread(s) per run" in page
    for heading in ("AP over iterations", "AP over time", "Training loss", "Channels"):
        assert f"<h2>{heading}" in page


def test_files_beside_it(study):
    path, _, _ = study
    assert (path.parent / "results.md").read_text().startswith("| variant |")
    assert (path.parent / "results.csv").read_text().count("\n") == 1 + 4
    assert (path.parent / "runs.csv").read_text().count("\n") == 1 + 12 * 2 * 2
    plots = sorted(p.stem for p in (path.parent / "plots").iterdir())
    assert plots == ["ap_over_iterations", "ap_over_time", "channels", "final_ap", "loss"]
    for plot in (path.parent / "plots").iterdir():
        assert np.asarray(Image.open(plot).convert("L")).std() > 5


def test_the_showcase_has_a_picture_of_the_runs(study):
    path, _, records = study
    root, options = path.parent, {"title": "t", "command": "c"}
    page = write_report(records, root, strip="000.png", **options).read_text()
    assert "<h2>AP over iterations, and one picture" in page
    pixels = np.asarray(Image.open(root / "plots" / "showcase.png").convert("RGB")).astype(int)
    for color in (TEAL, RED):  # the truth, and what a run has drawn
        assert (np.abs(pixels - color).max(-1) <= 12).sum() > 500
    with pytest.raises(ValueError, match=r"no run here has a picture 001\.png"):
        write_report(records, root, strip="001.png", **options)


def test_records_without_curves_or_pictures_still_make_a_report(tmp_path):
    record = make_record(loss=[], channels={}, step_seconds=None, memory_mb=None)
    page = write_report([record], tmp_path, title="t", command="c").read_text()
    assert "recorded on another machine" in page
    assert "<h2>Channels" not in page
    with pytest.raises(ValueError, match="nothing to report"):
        write_report([], tmp_path, title="t", command="c")


@pytest.mark.slow
def test_it_opens_in_a_browser_without_a_network(study, tmp_path):
    if BROWSER is None:
        assert "WSBCN_CI" not in os.environ, "no chromium: .ci/run could not install it with apt"
        pytest.skip("no chromium on this machine; .ci/run installs it where apt can")
    shot = tmp_path / "shot.png"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--window-size=1200,5000", f"--screenshot={shot}", study[0].as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert shot.is_file(), done.stderr[-2000:]
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape == (5000, 1200, 3)

    def count(color):
        return int((np.abs(pixels - color).max(-1) <= 12).sum())

    # Each picture is 190 pixels wide: one truth and four predictions.
    height = round(190 * 90 / 100)
    assert count(TEAL) == pytest.approx(190 * height, rel=0.1)
    assert count(RED) == pytest.approx(4 * 190 * height, rel=0.1)
    # The variants' colours: the curves were drawn, which a broken image would not show.
    assert count((0, 0x72, 0xB2)) > 300 and count((0xE6, 0x9F, 0)) > 300
    rows = np.flatnonzero((pixels < 250).any((1, 2)))
    assert rows.max() > 2500  # down to the provenance
