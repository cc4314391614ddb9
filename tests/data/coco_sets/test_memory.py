"""What is remembered of a set that was looked at is of the very same files."""

import json
import os
import shutil
from pathlib import Path

from PIL import Image

from wsbcn_d2.data.checks import look, look_at, memory
from wsbcn_d2.data.checks.findings import Findings

from .sets import SIZES, a_set, write


def test_a_set_is_looked_at_once_for_each_state(tmp_path, monkeypatch):
    entry = write(tmp_path / "data", a_set())
    seen = []
    stock = look.check_content
    monkeypatch.setattr(look, "check_content", lambda *a: seen.append(1) or stock(*a))
    first = look_at(entry["JSON"], entry["IMAGES"])
    memory.keep(first)
    again = look_at(entry["JSON"], entry["IMAGES"])
    assert len(seen) == 1 and again.facts == json.loads(json.dumps(first.facts))
    folder = tmp_path / "cache" / "wsbcn_d2" / "datasets"
    assert folder.stat().st_mode & 0o777 == 0o700  # names of pictures are their owner's alone
    Image.new("RGB", (9, 9)).save(tmp_path / "data" / "set" / "0.png")
    assert look_at(entry["JSON"], entry["IMAGES"]).faults and len(seen) == 2
    assert look_at(entry["JSON"], entry["IMAGES"]).faults and len(seen) == 3  # not remembered
    for path in (tmp_path / "cache").rglob("*.json"):
        path.write_text("{")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "data" / "set.json"))  # no folder
    Image.new("RGB", SIZES[0]).save(tmp_path / "data" / "set" / "0.png")
    found = look_at(entry["JSON"], entry["IMAGES"])
    memory.keep(found)
    assert not found.faults


def test_what_is_remembered_is_of_the_very_same_files(tmp_path, monkeypatch):
    entry = write(tmp_path / "data", a_set())
    pictures = Path(entry["IMAGES"])

    def key(decode=False, json_file=entry["JSON"], images=pictures):
        return memory.key_of(str(json_file), str(images), decode)

    keys = [key(), key(decode=True)]
    assert key() == keys[0]
    for path in (Path(entry["JSON"]), pictures / "1.png"):
        content, state = path.read_bytes(), path.stat()
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))  # as large, written anew
        keys.append(key())
        path.write_bytes(content + b" ")
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        keys.append(key())
        path.write_bytes(content)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert key() == keys[0]
    (pictures / "1.png").rename(pictures / "3.png")
    keys.append(key())
    (pictures / "3.png").rename(pictures / "1.png")
    shutil.copytree(tmp_path / "data", tmp_path / "other")  # with its files' times
    keys.append(key(images=tmp_path / "other" / "set"))
    keys.append(key(json_file=tmp_path / "other" / "set.json"))
    assert key() == keys[0]
    monkeypatch.setattr(memory, "_VERSION", memory._VERSION + 1)
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key(json_file=tmp_path / "absent.json") is None


def test_what_is_kept_are_the_notes_and_facts_of_good_sets(tmp_path):
    memory.keep(Findings(notes=["odd"], facts={"images": 3}, key="good"))
    kept = memory.recall("good")
    assert (kept.notes, kept.facts, kept.faults, kept.key) == (["odd"], {"images": 3}, {}, None)
    bad = Findings(key="bad")
    bad.fault("what", "where", "mend")
    memory.keep(bad)
    assert memory.recall("bad") is None and memory.recall(None) is None
    assert [path.name for path in (tmp_path / "cache").rglob("*.json")] == ["good.json"]
