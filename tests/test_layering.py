"""Nothing imports upward: the layers of the package, read off its source."""

import ast
import sys
from pathlib import Path

import pytest

import wsbcn_d2

PACKAGE = Path(wsbcn_d2.__file__).parent
# Sub-package -> sub-packages and modules of this project that it may import.
ALLOWED = {
    "layers": set(),
    "data": {"files"},
    "checkpoint": {"layers"},
    "modeling": {"layers"},
    "engine": {"layers", "modeling", "checkpoint", "data", "config"},
    "study": {"layers", "checkpoint", "engine", "config"},
}
LAYERS_MAY_IMPORT = ("torch", "detectron2.layers", "fvcore.common.registry")


def imported(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, wherever in the file."""
    package = ["wsbcn_d2", *path.relative_to(PACKAGE).with_suffix("").parts[:-1]]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return names


FILES = [(part, path) for part in ALLOWED for path in sorted((PACKAGE / part).rglob("*.py"))]


@pytest.mark.parametrize("part,path", FILES, ids=lambda v: v if isinstance(v, str) else v.stem)
def test_nothing_imports_upward(part, path):
    ours = {name.split(".")[1] for name in imported(path) if name.startswith("wsbcn_d2.")}
    assert ours <= ALLOWED[part] | {part}


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "layers").glob("*.py")), ids=lambda path: path.stem
)
def test_layers_stand_on_torch_and_detectron2_layers_alone(path):
    foreign = {
        name
        for name in imported(path)
        if not name.startswith(("wsbcn_d2", *LAYERS_MAY_IMPORT))
        and name.split(".")[0] not in sys.stdlib_module_names
    }
    # Importing a name from detectron2.layers also names its parent.
    assert foreign <= {"detectron2"}


def test_every_part_is_held_to_the_rule():
    parts = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()}
    assert parts == set(ALLOWED)
