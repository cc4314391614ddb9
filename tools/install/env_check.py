#!/usr/bin/env python3
"""Says whether the running Python can serve this project: `env_check.py [vis] [dev]`.

Exit status 0 when it can; otherwise 1 and one line that names the first thing missing. The
requirements are those of setup.py, read as text.
"""

import ast
import importlib
import importlib.util
import sys
from importlib import metadata
from pathlib import Path

SETUP = Path(__file__).resolve().parents[2] / "setup.py"


def read_requirements(extras, setup=SETUP):
    """The requirement strings of setup.py for the given extras."""
    lists = {}
    for node in ast.parse(setup.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List):
            lists[node.targets[0].id] = ast.literal_eval(node.value)
    return [r for name in ("requires", *extras) for r in lists[name.upper()]]


def problem(requirement):
    """What is wrong with this requirement here, or None."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        from pip._vendor.packaging.requirements import Requirement
    parsed = Requirement(requirement)
    if parsed.name.startswith("opencv-python"):  # any of its four packages will do
        return None if importlib.util.find_spec("cv2") else "cv2 (OpenCV) is missing"
    try:
        version = metadata.version(parsed.name)
    except metadata.PackageNotFoundError:
        return f"{requirement} is missing"
    if not parsed.specifier.contains(version, prereleases=True):
        return f"{requirement} is needed, {version} is installed"
    return None


def main(extras):
    """Checks and prints; returns the exit status."""
    found = next(filter(None, map(problem, read_requirements(extras))), None)
    if found is None:
        try:
            for name in ("torch", "torchvision", "detectron2.layers"):
                importlib.import_module(name)
        except Exception as err:  # a broken binary raises more than ImportError
            found = f"{name} does not import: {err}"
    if found:
        print(found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
