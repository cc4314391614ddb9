"""How the project is laid out: no imports upward or in a circle, and each file says its use."""

import ast
import graphlib
import importlib.util
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import wsbcn_d2

PACKAGE = Path(wsbcn_d2.__file__).parent
ROOT = PACKAGE.parent
# Sub-package or module of the package -> those that it may import. What holds files together,
# "files", is for all but the layers.
ALLOWED = {
    "files": set(),
    "layers": set(),
    "safe_yaml": set(),
    "config": {"safe_yaml", "data", "layers"},
    "folding": {"layers"},
    "data": {"files"},
    "checkpoint": {"files", "layers"},
    "modeling": {"layers"},
    "engine": {
        "files",
        "safe_yaml",
        "layers",
        "modeling",
        "checkpoint",
        "data",
        "config",
        "folding",
    },
    "predictor": {"safe_yaml", "checkpoint", "config", "data", "engine", "folding"},
    "model_zoo": {"checkpoint", "config"},
    "study": {"files", "layers", "checkpoint", "engine", "config", "predictor"},
    "cli": {"checkpoint", "files", "config", "data", "engine", "predictor"},
}
LAYERS_MAY_IMPORT = ("torch", "detectron2.layers", "fvcore.common.registry")
# Imported on a GPU alone, by name (see dispatch.py): the package works where Triton is absent.
GPU_KERNELS = sorted((PACKAGE / "layers/kernels").glob("triton_*.py"))
SOURCES = sorted(
    path
    for top in ("wsbcn_d2", "tools", "configs", "tests")
    for path in (ROOT / top).rglob("*.py")
    if not path.is_symlink()  # configs/lazy: other names of one file
)
SOURCES.append(ROOT / "setup.py")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def folders(path):
    """Where a file's absolute imports may lead within the project."""
    return (ROOT, path.parent, ROOT / "tools", ROOT / "tests")


def file_of(base: Path) -> Path | None:
    """The module or package of this path without its suffix."""
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def imported_files(path: Path) -> set[Path]:
    """Files of this project that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [(alias.name, None) for alias in node.names]
            roots = folders(path)
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "", alias.name) for alias in node.names]
            roots = [path.parents[node.level - 1]] if node.level else folders(path)
        else:
            continue
        for module, attribute in names:
            for root in roots:
                base = root.joinpath(*module.split(".")) if module else root
                # A name of a package is its module of that name, if it has one.
                target = (file_of(base / attribute) if attribute else None) or file_of(base)
                if target:
                    found |= {target} - {path}
                    break
    return found


GRAPH = {path: imported_files(path) for path in SOURCES}


def test_nothing_imports_in_a_circle():
    try:
        graphlib.TopologicalSorter(GRAPH).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(map(name_of, error.args[1])))


def test_the_search_for_circles_finds_what_is_imported():
    def of(name):
        return {name_of(path) for path in GRAPH[ROOT / name]}

    assert {"wsbcn_d2/config.py", "wsbcn_d2/layers/__init__.py"} <= of("wsbcn_d2/__init__.py")
    assert {"tools/benchmarks/runner.py", "tools/benchmarks/steps.py"} <= of("tools/benchmark.py")
    assert of("tools/benchmarks/steps.py") >= {
        "tools/benchmarks/runner.py",
        "wsbcn_d2/engine/__init__.py",
    }
    assert "tools/install/detectron2_wheel.py" in of("tools/install/install_detectron2.py")
    assert "tests/conftest.py" in of("tests/performance/test_costs.py")
    assert any(name_of(path).startswith("configs/lazy/") and GRAPH[path] for path in GRAPH)


def parts() -> dict[str, list[Path]]:
    """Files of each sub-package and module of the package."""
    result: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        first = path.relative_to(PACKAGE).with_suffix("").parts[0]
        result.setdefault(first, []).append(path)
    result.pop("__init__")
    return result


PARTS = parts()


def test_every_part_is_held_to_the_rule():
    assert PARTS.keys() == ALLOWED.keys()


@pytest.mark.parametrize("part", PARTS)
def test_nothing_imports_upward(part):
    for path in PARTS[part]:
        inside = [p for p in GRAPH[path] if PACKAGE in p.parents]
        ours = {p.relative_to(PACKAGE).with_suffix("").parts[0] for p in inside}
        assert ours <= ALLOWED[part] | {part}, name_of(path)


def test_nothing_but_the_gpu_kernels_needs_triton():
    assert len(GPU_KERNELS) == 5
    for path in SOURCES:
        if PACKAGE in path.parents and path not in GPU_KERNELS:
            assert not GRAPH[path] & set(GPU_KERNELS), name_of(path)


@pytest.mark.parametrize("path", PARTS["layers"], ids=name_of)
def test_layers_stand_on_torch_and_detectron2_layers_alone(path):
    foreign = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            foreign |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            foreign |= {f"{node.module}.{alias.name}" for alias in node.names}
    gpu = ("triton",) if path in GPU_KERNELS else ()
    assert not {
        name
        for name in foreign
        if not name.startswith(LAYERS_MAY_IMPORT + gpu)
        and name.split(".")[0] not in sys.stdlib_module_names
    }


def test_no_folder_has_more_than_ten_modules():
    counts: dict[str, int] = {}
    for path in SOURCES:
        if path.name not in ("__init__.py", "conftest.py"):
            folder = name_of(path.parent)
            counts[folder] = counts.get(folder, 0) + 1
    assert {folder: count for folder, count in counts.items() if count > 10} == {}


def first_line(path):
    """Of the file's docstring, which comes before everything but the interpreter's name."""
    text = re.sub(r"^#!.*\n", "", path.read_text())
    docstring = ast.get_docstring(ast.parse(text)) if text.lstrip("rf").startswith('"""') else None
    return (docstring or "").split("\n")[0]


def test_a_files_first_line_says_what_it_is_for():
    wordless = [path for path in SOURCES if len(first_line(path).split()) < 3]
    assert [name_of(path) for path in wordless if path.read_text()] == []  # packages may be empty


def test_no_module_is_hidden_by_a_name_of_its_package():
    hidden = []
    for info in pkgutil.walk_packages([str(PACKAGE)], "wsbcn_d2."):
        package, _, name = info.name.rpartition(".")
        if name.startswith("triton_") and not importlib.util.find_spec("triton"):
            continue
        module = importlib.import_module(info.name)
        if getattr(importlib.import_module(package), name) is not module:
            hidden.append(info.name)
    assert hidden == []


WALK = re.findall(r"^- (.+?): ``([\w/.*-]+)``(?: \((\w+)\))?$", wsbcn_d2.__doc__, re.MULTILINE)


def test_the_walk_has_one_line_for_each_thing():
    assert len(WALK) == wsbcn_d2.__doc__.count("\n- ") >= 15
    assert len({thing for thing, _, _ in WALK}) == len(WALK)


@pytest.mark.parametrize("thing,path,name", WALK, ids=lambda text: text)
def test_the_walk_leads_to_what_it_says(thing, path, name):
    target = ROOT / path
    assert target.exists()
    if name:
        files = [target] if target.is_file() else sorted(target.glob("*.py"))
        defined = set()
        for node in [n for file in files for n in ast.parse(file.read_text()).body]:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                defined |= {t.id for t in targets if isinstance(t, ast.Name)}
        assert name in defined
