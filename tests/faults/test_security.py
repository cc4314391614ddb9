"""No file is unpickled but by the restricted readers, and no user input reaches a shell."""

import ast
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from wsbcn_d2.checkpoint import CheckpointError, WSBCNCheckpointer

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*ROOT.glob("wsbcn_d2/**/*.py"), *ROOT.glob("tools/*.py"), ROOT / "setup.py"])
SCRIPTS = sorted([*ROOT.glob("tools/*.sh"), *ROOT.glob(".ci/*")])

LOADERS = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
SHELLS = {("os", "system"), ("os", "popen"), ("subprocess", "getoutput")}
SHELLS |= {("subprocess", "getstatusoutput"), ("commands", "getoutput")}


def dotted(node):
    """("a", "b", "c") of the expression a.b.c; () of anything else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return (node.id, *reversed(parts)) if isinstance(node, ast.Name) else ()


def keyword(call, name):
    values = [k.value for k in call.keywords if k.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None


def findings(source):
    """What an auditor would object to, one line each."""
    found = []
    for node in ast.walk(ast.parse(source)):
        where = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            if node.module in LOADERS and names & {"load", "loads", "Unpickler"}:
                found.append(f"{where}: from {node.module} import {names}")
            if node.module == "torch" and "load" in names:
                found.append(f"{where}: from torch import load")
            if node.module in ("os", "subprocess"):
                found += [f"{where}: {n}" for m, n in SHELLS if m == node.module and n in names]
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        if name[-2:] == ("torch", "load") and keyword(node, "weights_only") is not True:
            found.append(f"{where}: torch.load without weights_only=True")
        if len(name) == 2 and name[0] in LOADERS and name[1] in ("load", "loads", "open"):
            found.append(f"{where}: {'.'.join(name)}")
        if name[-2:] in SHELLS:
            found.append(f"{where}: {'.'.join(name)}")
        if keyword(node, "shell") not in (None, False):
            found.append(f"{where}: shell=True")
        if any(k.arg == "shell" and not isinstance(k.value, ast.Constant) for k in node.keywords):
            found.append(f"{where}: shell=...")
        if name[-1:] == ("load",) and keyword(node, "allow_pickle"):
            found.append(f"{where}: allow_pickle=True")
        if name in (("eval",), ("exec",)):
            found.append(f"{where}: {name[0]}")
        if name[:1] == ("yaml",) and name[-1] in ("load", "unsafe_load", "full_load"):
            found.append(f"{where}: {'.'.join(name)}")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "from torch import load",
        "import pickle\npickle.load(stream)",
        "pickle.loads(data)",
        "from pickle import Unpickler",
        "subprocess.run(command, shell=True)",
        "subprocess.run(command, shell=flag)",
        "os.system('rm ' + name)",
        "from os import popen",
        "numpy.load(path, allow_pickle=True)",
        "eval(text)",
        "yaml.load(text)",
    ],
)
def test_the_audit_finds(source):
    assert findings(source)


def test_the_audit_lets_pass():
    assert not findings(
        "import torch, subprocess, pickle\n"
        "torch.load(path, map_location='cpu', weights_only=True)\n"
        "subprocess.run(['ls', name], check=True)\n"
        "class Restricted(pickle.Unpickler): pass\n"
        "model.eval()\nyaml.safe_load(text)\npickle.dumps(x)\njson.load(f)\n"
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_is_clean(path):
    assert findings(path.read_text("utf-8")) == []


def test_unpicklers_are_subclassed_in_one_place():
    users = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("Unpickler", "_Unpickler")
    ]
    assert set(users) <= {"wsbcn_d2/checkpoint/files/pickles.py"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_evaluate_no_text(path):
    text = path.read_text("utf-8")
    found = re.findall(r"\beval\s|\bsh -c\b|\|\s*(?:ba)?sh\b|\b(?:curl|wget)\s", text)
    assert not found, f"{path.name}: {found}"


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("name", ["model.pth", "model.pkl", "model.pyth", "model.pt"])
@pytest.mark.parametrize("resume", [False, True])
def test_weights_that_run_code_are_refused(name, resume, tmp_path):
    """Whatever their extension, in MODEL.WEIGHTS and as the checkpoint of a resumed run."""
    marker, path = str(tmp_path / "owned"), tmp_path / name
    content = {"model": {"weight": Payload(marker)}, "model_state": Payload(marker)}
    if name.endswith(".pkl"):
        path.write_bytes(pickle.dumps({**content, "__author__": "somebody"}))
    else:
        torch.save(content, path)
    if resume:
        (tmp_path / "last_checkpoint").write_text(name)
    checkpointer = WSBCNCheckpointer(nn.Linear(2, 2), str(tmp_path))
    with pytest.raises(CheckpointError):
        checkpointer.resume_or_load(str(path), resume=resume)
    assert not os.path.exists(marker)


def test_the_payload_works(tmp_path):
    """That the test above can fail."""
    marker = str(tmp_path / "owned")
    pickle.loads(pickle.dumps(Payload(marker)))
    assert os.path.exists(marker)
