"""Configs from strangers: no tool runs their code, fetches for them, or drowns in them."""

import http.server
import os
import runpy
import sys
import threading
import time

import pytest
import torch
import yaml
from conftest import ROOT
from detectron2.config import CfgNode

from wsbcn_d2 import Predictor, get_cfg, model_zoo, safe_yaml
from wsbcn_d2.config import UsageError, load_config

GOOD = ROOT / "configs/shapes/mask_rcnn_R_18_FPN_gn.yaml"
ATTACKS = {
    "apply": "OUTPUT_DIR: !!python/object/apply:os.mkdir [{marker}]\n",
    "new": "OUTPUT_DIR: !!python/object/new:os.mkdir [{marker}]\n",
    "eval": 'OUTPUT_DIR: !!python/object/apply:eval [\'__import__("os").mkdir("{marker}")\']\n',
    "name": "OUTPUT_DIR: !!python/name:os.mkdir\n",
    "module": "OUTPUT_DIR: !!python/module:antigravity\n",
    "nested": "MODEL:\n  RESNETS:\n    NORM: !!python/object/apply:os.mkdir [{marker}]\n",
    "in a key": "? !!python/object/apply:os.mkdir [{marker}]\n: 1\n",
    "second document": "VERSION: 2\n---\nX: !!python/object/apply:os.mkdir [{marker}]\n",
}


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "ran"
    yield path
    assert not path.exists(), "code of the config ran"


def write(path, text, **values):
    path.write_text(text.format(**values) if values else text)
    return str(path)


def refused(path, match):
    with pytest.raises(UsageError, match=match) as caught:
        load_config(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("base", [False, True], ids=["itself", "base"])
def test_tags_run_nothing(attack, base, marker, tmp_path):
    path = write(tmp_path / "evil.yaml", ATTACKS[attack], marker=marker)
    if base:  # through a chain of files
        write(tmp_path / "middle.yaml", "_BASE_: evil.yaml\n")
        path = write(tmp_path / "leaf.yaml", "_BASE_: [middle.yaml]\n")
    assert "evil.yaml" in refused(path, "python|single document|unhashable")


def test_the_attack_works_on_stock_detectron2(tmp_path):
    """That the tests here can fail."""
    from detectron2.config import get_cfg as stock

    marker = tmp_path / "ran"
    path = write(tmp_path / "evil.yaml", ATTACKS["apply"], marker=marker)
    with pytest.raises(Exception):  # noqa: B017 (None is no OUTPUT_DIR)
        stock().merge_from_file(path)
        raise AssertionError
    assert marker.exists()


def test_whoever_starts_from_get_cfg_is_protected(marker, tmp_path):
    path = write(tmp_path / "evil.yaml", ATTACKS["apply"], marker=marker)
    for cfg in (get_cfg(), get_cfg().clone()):
        for unsafe in (False, True):
            with pytest.raises(ValueError, match="runs no code"):
                cfg.merge_from_file(path, unsafe)
        with pytest.raises(ValueError, match="runs no code"):
            cfg.load_yaml_with_base(path, allow_unsafe=True)


TOOLS = {
    "train_net.py": ["--config-file", "{config}"],
    "lazyconfig_train_net.py": ["--config-file", "{config}"],
    "compare.py": ["--configs", "{config}", "--report-only", "--output", "{out}"],
    "compare.py run": ["--configs", "{config}", "--output", "{out}"],
    "fold_checkpoint.py": ["--config-file", "{config}", "--weights", "w", "--output", "{out}/f"],
    "predict.py": ["--config-file", "{config}", "--weights", "{weights}", "--output", "{out}"],
    "benchmark.py": ["step", "{config}", "{config}", "--quick"],
}


@pytest.mark.parametrize("tool", TOOLS)
def test_no_tool_runs_a_configs_code(tool, marker, tmp_path, monkeypatch, capsys):
    values = {
        "config": write(tmp_path / "evil.yaml", ATTACKS["apply"], marker=marker),
        "weights": str(tmp_path / "w.pth"),
        "out": str(tmp_path / "out"),
    }
    torch.save({"model": {}}, values["weights"])
    arguments = [word.format(**values) for word in TOOLS[tool]]
    if tool == "predict.py":
        from PIL import Image

        Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
        arguments.append(str(tmp_path / "a.png"))
    script = ROOT / "tools" / tool.partition(" ")[0]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    monkeypatch.syspath_prepend(str(script.parent))
    with pytest.raises((SystemExit, ValueError)) as stop:
        runpy.run_path(str(script), run_name="__main__")
    if stop.type is SystemExit:
        assert stop.value.code == 2
        assert "runs no code" in capsys.readouterr().err
    else:
        assert "runs no code" in str(stop.value)


def test_a_config_beside_a_strangers_checkpoint(marker, tmp_path):
    write(tmp_path / "config.yaml", ATTACKS["apply"], marker=marker)
    torch.save({"model": {}}, tmp_path / "model.pth")
    with pytest.raises(UsageError, match="config.yaml"):
        Predictor.from_checkpoint(tmp_path / "model.pth")


def test_model_zoo_reads_shipped_configs_alone(marker, tmp_path):
    write(tmp_path / "evil.yaml", ATTACKS["apply"], marker=marker)
    for name in (str(tmp_path / "evil.yaml"), os.path.relpath(tmp_path / "evil.yaml", ROOT)):
        with pytest.raises(RuntimeError, match="not available"):
            model_zoo.get_config(name)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A machine that would serve a config; what is asked of it is in ``asked``."""
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))

    class Handler(http.server.BaseHTTPRequestHandler):
        asked = []

        def log_message(self, *args):
            pass

        def do_GET(self):
            self.asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"SEED: 7\n")

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.asked = Handler.asked
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join(10)


def test_a_base_on_another_machine_is_not_fetched_unless_asked(server, tmp_path):
    url = f"http://127.0.0.1:{server.server_address[1]}/base.yaml"
    path = write(tmp_path / "leaf.yaml", f"_BASE_: {url}\n")
    refused(path, "on another machine")
    assert server.asked == []
    cfg = get_cfg()
    cfg.merge_from_file(path, allow_remote=True)
    assert cfg.SEED == 7 and server.asked == ["/base.yaml"]
    with pytest.raises(ValueError, match="on another machine"):
        cfg.load_yaml_with_base(path)  # what was asked once does not last
    refused(path, "on another machine")
    assert server.asked == ["/base.yaml"]


@pytest.mark.parametrize(
    "scheme", ["https://x", "file://x", "detectron2://x", "wsbcn://x", "s3://x", "HTTP://x"]
)
def test_other_schemes(scheme, tmp_path):
    write(tmp_path / "middle.yaml", f"_BASE_: {scheme}/base.yaml\n")
    refused(write(tmp_path / "leaf.yaml", "_BASE_: middle.yaml\n"), "on another machine")


def test_inheritance_in_a_circle(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "a.yaml", "_BASE_: sub/../b.yaml\n")
    write(tmp_path / "b.yaml", "_BASE_: ./sub/../a.yaml\n")
    refused(str(tmp_path / "a.yaml"), "inherits from itself")
    write(tmp_path / "c.yaml", "_BASE_: c.yaml\n")
    refused(str(tmp_path / "c.yaml"), "inherits from itself")
    for i in range(60):
        write(tmp_path / f"{i}.yaml", f"_BASE_: {i + 1}.yaml\n")
    write(tmp_path / "60.yaml", "SEED: 1\n")
    refused(str(tmp_path / "0.yaml"), "too long a chain")


@pytest.mark.parametrize(
    "text, match",
    [
        ("_BASE_: [[a]]\n", "path of a file, not list"),
        ("_BASE_: 3\n", "path of a file, not int"),
        ("_BASE_: absent.yaml\n", "absent.yaml not found"),
        ("- 1\n", "holds no KEY: value lines"),
        ("just text", "holds no KEY: value lines"),
        ("MODEL: {RESNETS: [\n", "expected|parsing"),
        ("a: \x00\n", "special characters"),
        ("MODEL: 3\n", "MODEL"),
        ("X: &a [*a]\n", "aliases written out"),
        ("X: " + "[" * 5000 + "\n", "levels|expected|recursion"),
        ("X: " + "y" * 2_000_000 + "\n", "more than 1048576 characters"),
    ],
)
def test_other_nonsense_is_one_line(text, match, tmp_path):
    refused(write(tmp_path / "bad.yaml", text.replace("{", "{{").replace("}", "}}"), x=0), match)


@pytest.mark.parametrize("kind", ["list", "merge"])
def test_a_billion_laughs(kind, tmp_path):
    lines = ["a0: &a0 [ha]" if kind == "list" else "a0: &a0 {ha: 1}"]
    for i in range(1, 40):
        again = f"[{', '.join([f'*a{i - 1}'] * 9)}]"
        lines.append(f"a{i}: &a{i} " + (again if kind == "list" else f"{{<<: {again}}}"))
    start = time.monotonic()
    refused(write(tmp_path / "laughs.yaml", "\n".join(lines)), "aliases written out")
    assert time.monotonic() - start < 5


def test_what_is_legitimate_is_read_as_before(tmp_path):
    write(tmp_path / "base.yaml", "SEED: 1\nINPUT:\n  FORMAT: RGB\n  MIN_SIZE_TEST: 5\n")
    write(tmp_path / "more.yaml", "INPUT: {MIN_SIZE_TEST: 6}\n")
    text = "_BASE_: [base.yaml, ~/absent/../../.." + str(tmp_path / "more.yaml") + "]\n"
    text = text.replace("~/absent/../../..", "")
    text += "DATASETS:\n  TRAIN: !!python/tuple [a, b]\nINPUT: {MIN_SIZE_TRAIN: &s [7, 8]}\n"
    path = write(tmp_path / "leaf.yaml", text.replace("{", "{{").replace("}", "}}"), x=0)
    cfg = get_cfg()
    cfg.merge_from_file(path)
    assert cfg.DATASETS.TRAIN == ("a", "b") and cfg.INPUT.MIN_SIZE_TRAIN == (7, 8)
    assert (cfg.SEED, cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TEST) == (1, "RGB", 6)
    dumped = write(tmp_path / "config.yaml", "")
    with open(dumped, "w") as stream:
        stream.write(cfg.dump())
    again = get_cfg()
    again.merge_from_file(dumped)
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump()) and isinstance(again, CfgNode)
    assert yaml.safe_load(cfg.dump())["SEED"] == 1


def test_whose_config_it_is_is_told_by_where_it_lies(marker, tmp_path, monkeypatch):
    """A link to one of Detectron2's own is its own; one within its folder to another's is not."""
    from detectron2 import model_zoo as zoo

    (tmp_path / "base.yaml").symlink_to(zoo.get_config_file("Base-RetinaNet.yaml"))
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "base.yaml"))
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES[0][1] == 32 * 2 ** (1 / 3)
    folder = tmp_path / "detectron2"
    folder.mkdir()
    monkeypatch.setattr(safe_yaml, "_DETECTRON2", os.path.join(os.path.realpath(folder), ""))
    evil = write(tmp_path / "evil.yaml", ATTACKS["apply"], marker=marker)
    (folder / "good.yaml").symlink_to(evil)
    refused(str(folder / "good.yaml"), "runs no code")
    (tmp_path / "detectron2-other").mkdir()
    evil = write(tmp_path / "detectron2-other" / "a.yaml", ATTACKS["apply"], marker=marker)
    refused(evil, "runs no code")


@pytest.mark.parametrize("more, refusal", [(0, None), (1, "more than 1048576 characters")])
def test_the_largest_config(more, refusal, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("SEED: 3\n#" + "x" * (2**20 - 9 + more))
    if refusal:
        refused(str(path), refusal)
    else:
        assert load_config(str(path)).SEED == 3


def test_the_deepest_and_the_fullest_config(tmp_path):
    """50 levels, and 100,000 values with what aliases repeat."""
    texts = {"X: " + "[" * n + "]" * n: n <= 50 for n in (50, 51)}
    thousand = f"[{', '.join('1' * 999)}]"  # and the list itself
    for more in (994, 995):  # 1 + 3 keys + 1,000 + 98,001 + a list of so many
        lines = [f"a: &a {thousand}", f"b: [{', '.join(['*a'] * 98)}]", f"c: [{'1, ' * more}]"]
        texts["\n".join(lines)] = more == 994
    for text, fits in texts.items():
        (tmp_path / "a.yaml").write_text(text)
        if fits:
            assert safe_yaml.read_yaml(str(tmp_path / "a.yaml"))
        else:
            with pytest.raises(ValueError, match="more than 100000 values or 50 levels"):
                safe_yaml.read_yaml(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize("heirs, refusal", [(50, None), (51, "too long a chain of files")])
def test_the_longest_chain_of_files(heirs, refusal, tmp_path):
    (tmp_path / "0.yaml").write_text("SEED: 3\n")
    for i in range(heirs):
        (tmp_path / f"{i + 1}.yaml").write_text(f"_BASE_: {i}.yaml\n")
    if refusal:
        refused(str(tmp_path / f"{heirs}.yaml"), refusal)
    else:
        assert load_config(str(tmp_path / f"{heirs}.yaml")).SEED == 3


def test_detectron2s_own_configs_may_compute():
    """The zoo's RetinaNet says its anchors as an expression, which an installed package may."""
    from detectron2 import model_zoo as zoo

    cfg = get_cfg()
    cfg.merge_from_file(zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES[0][1] == 32 * 2 ** (1 / 3)
