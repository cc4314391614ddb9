"""tools/check_dataset.py: what it counts, says and draws."""

import importlib.util
import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from detectron2.data import MetadataCatalog
from PIL import Image

from wsbcn_d2.data.checks import look_at, pictures, summarize
from wsbcn_d2.data.checks.findings import Findings
from wsbcn_d2.data.drawing import draw_some

from .sets import SIZES, a_set, deep, looked_at, over_the_edge, runs, write


def test_the_tool_sums_up_and_draws(tmp_path, monkeypatch, capsys):
    entry = write(tmp_path / "data", a_set())
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools" / "check_dataset.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(*options):
        words = ["check_dataset.py", entry["JSON"], entry["IMAGES"], *map(str, options)]
        monkeypatch.setattr(sys, "argv", words)
        return tool.cli(), *capsys.readouterr()

    code, out, err = run("--draw", tmp_path / "drawn", "--count", 2)
    assert code == 0 and not err
    assert "pictures   3, of 64 x 72 to 80 x 64 pixels; 0 without objects" in out
    assert "objects    6, 2.0 per picture; 100 % small" in out
    assert "masks      6 polygons, 0 run lengths" in out and "round  3" in out
    assert sorted(p.name for p in (tmp_path / "drawn").iterdir()) == ["1_0.png", "3_2.png"]
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(tool, "draw_some", lambda *args: asked.append(args) or [])
        assert run("--draw", "a")[0] == run("--draw", "b", "--picture-range", 1, 9)[0] == 0
    files = (entry["JSON"], entry["IMAGES"])
    assert asked == [(*files, "a", 6, ()), (*files, "b", 6, [1.0, 9.0])]
    # A picture that breaks off is found when its pixels are read, and every fault has its line.
    path = tmp_path / "data" / "set" / "0.png"
    path.write_bytes(path.read_bytes()[:3000])
    assert run()[0] == 0
    code, out, err = run("--decode")
    assert code == 2 and err.count("error: ") == 1 and "picture that cannot be read (0.png" in err
    deep(None, tmp_path / "data" / "set")
    (tmp_path / "data" / "set" / "1.png").unlink()
    code, out, err = run()
    assert code == 2 and err.count("\n") == 2 and "--picture-range" in err and "missing" in err
    assert run("--picture-range", 0, 4095)[2].count("\n") == 1
    assert not (tmp_path / "cache").exists()


def test_pictures_are_drawn_in_their_colours(tmp_path):
    content = a_set()
    entry = write(tmp_path, content)
    Image.new("RGB", SIZES[0], (230, 60, 20)).save(tmp_path / "set" / "0.png")
    paths = draw_some(entry["JSON"], entry["IMAGES"], str(tmp_path / "drawn"), 9)
    assert [Path(path).name for path in paths] == ["1_0.png", "2_1.png", "3_2.png"]
    drawn = np.asarray(Image.open(paths[0]))
    assert drawn[-2:, -2:].tolist() == [[[230, 60, 20]] * 2] * 2  # no object is there
    assert (drawn[5:45, 5:54] != (230, 60, 20)).any()
    assert f"__drawing__ {os.path.abspath(entry['JSON'])}" not in MetadataCatalog.list()


def test_the_tool_says_what_is_odd_and_no_fault(tmp_path, monkeypatch, capsys):
    content = a_set()
    over_the_edge(content, None)
    entry = write(tmp_path, content)
    tool = runpy.run_path(str(ROOT / "tools" / "check_dataset.py"))
    monkeypatch.setattr(sys, "argv", ["check_dataset.py", entry["JSON"], entry["IMAGES"]])
    assert tool["cli"]() == 0
    said = capsys.readouterr()
    assert said.err == "" and said.out.splitlines()[-1] == "  long   3"
    content["annotations"][0]["bbox"] = [-3, -3, 80, 40]
    Path(entry["JSON"]).write_text(json.dumps(content))
    assert tool["cli"]() == 0
    note = "note: 1 boxes reach over the picture's edge and are cut there"
    assert capsys.readouterr().out.splitlines()[-1] == note


def test_sizes_are_those_of_coco():
    """Small below 32 x 32, large from 96 x 96 on; by the box where there is no area."""
    content = a_set()
    for annotation, area in zip(content["annotations"], (1023, 1024, 9215, 9216, 0), strict=False):
        annotation["area"] = area
    del content["annotations"][5]["area"]
    content["annotations"][5]["bbox"] = [0, 0, 32, 32]
    facts = looked_at(content).facts
    assert (facts["small"], facts["medium"], facts["large"]) == (2, 3, 1)


def test_every_number_of_a_summary(tmp_path):
    """Of four pictures, one without objects; a crowd counts as none of them."""
    content = a_set()
    content["images"].append({**content["images"][0], "id": 4})
    content["annotations"][0].update(iscrowd=1)
    content["annotations"][1]["area"] = 32**2
    content["annotations"][2]["area"] = 96**2
    del content["annotations"][3]["segmentation"]
    content["annotations"][4]["segmentation"] = runs(5, 5, content["images"][2])
    for annotation in content["annotations"][:3]:
        annotation["keypoints"] = [9, 9, 2] * 3
    entry = write(tmp_path, content)
    assert summarize(look_at(entry["JSON"], entry["IMAGES"]).facts).splitlines() == [
        "pictures   4, of 64 x 72 to 80 x 64 pixels; 1 without objects",
        "objects    5, 1.2 per picture; 60 % small, 20 % medium, 20 % large "
        "(below 32 x 32, 96 x 96 pixels, above)",
        "masks      3 polygons, 1 run lengths, 1 objects without; 1 crowd regions",
        "keypoints  2 objects, [3] points each",
        "classes    2",
        "  round  2",
        "  long   3",
    ]


@pytest.mark.parametrize("count, shown", [(5000, []), (5001, [5001])])
def test_progress_is_shown_of_large_sets(count, shown, tmp_path, monkeypatch):
    totals = []
    monkeypatch.setattr(pictures, "_look", lambda *a: (None, [], ""))
    monkeypatch.setattr(
        pictures, "progress", lambda seen, *, total, desc: totals.append(total) or seen
    )
    entry = {"file_name": "a", "width": 3, "height": 4}
    found = Findings()
    entries = [{**entry, "width": 9}, *[entry] * (count - 1)]
    pictures.check_pictures(entries, str(tmp_path), found)
    assert totals == shown and found.facts == {"deep": 0, "sizes": [[3, 4], [9, 4]]}
