#!/usr/bin/env python3
"""Installs Detectron2 into the Python that runs this script, if it is not there yet.

Detectron2 has no release on the package index, so this tries in turn

1. the official repository at a pinned commit, compiled on this machine (needs GitHub, a compiler);
2. a pure-Python wheel of v0.6 made from an sdist on the index (see detectron2_wheel.py).

    python tools/install/install_detectron2.py [--source auto|git|pure] [--verbose]

torch must be installed already. An explicit --source installs even where Detectron2 is present.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from detectron2_wheel import InstallError, last_error, make_wheel

REPO = "https://github.com/facebookresearch/detectron2.git"
COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"
LACKS = "no rotated boxes, no deformable convolutions; COCO evaluation by pycocotools"
PROBE_SECONDS = 10
GIT_SECONDS = 3600
MEND = (
    "let this machine reach github.com, or pip an index that carries pb1-detectron2==0.6"
    " (PIP_INDEX_URL, PIP_FIND_LINKS), then run tools/install/install_detectron2.py again"
)


def run(command, **options):
    """Runs a command that asks nothing; its output is captured unless the options say otherwise."""
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "true"},
        text=True,
        check=False,
        **{"capture_output": True, **options},
    )


def python(code):
    """Runs `code` in a fresh interpreter away from the checkout; returns (ok, last line)."""
    done = run([sys.executable, "-c", code], cwd=tempfile.gettempdir())
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else ""


def describe():
    """One line about the installed Detectron2, or None where it cannot be imported."""
    ok, line = python(
        "import importlib.util as u, detectron2.layers as l, detectron2 as d\n"
        "spec = u.find_spec('detectron2._C')\n"
        "print('|'.join([d.__version__, spec.origin if spec else '', d.__path__[0]]))"
    )
    if not ok:
        return None
    version, extension, folder = line.split("|")
    compiled = extension and not extension.endswith(".py")
    return f"Detectron2 {version}, {'compiled' if compiled else f'pure Python: {LACKS}'} ({folder})"


def pip(*args, verbose=False, timeout=None):
    """Runs pip; raises InstallError with pip's own error line where it fails."""
    command = [sys.executable, "-m", "pip", *args]
    try:
        done = run(command, capture_output=not verbose, timeout=timeout)
    except subprocess.TimeoutExpired as err:
        raise InstallError(f"pip {args[0]} took longer than {timeout} s") from err
    if done.returncode:
        reason = "see above" if verbose else last_error(done.stdout + done.stderr)
        raise InstallError(f"pip {args[0]} failed: {reason}")


def probe_git():
    """Raises InstallError within seconds where the official repository cannot be reached."""
    try:
        done = run(["git", "ls-remote", "--exit-code", REPO, "HEAD"], timeout=PROBE_SECONDS)
    except FileNotFoundError as err:
        raise InstallError("git is not installed") from err
    except subprocess.TimeoutExpired as err:
        raise InstallError(f"{REPO} did not answer within {PROBE_SECONDS} s") from err
    if done.returncode:
        raise InstallError(f"{REPO} cannot be reached: {last_error(done.stderr)}")


def install_wheel(wheel, verbose=False):
    """Installs the wheel in place of whatever Detectron2 there is, then its requirements."""
    # In one go, --force-reinstall would reinstall the requirements as well.
    pip("install", "--force-reinstall", "--no-deps", str(wheel), verbose=verbose)
    pip("install", str(wheel), verbose=verbose)


def install_git(verbose=False):
    """Compiles and installs the pinned official commit."""
    probe_git()
    print(f"installing Detectron2 {COMMIT[:7]} from {REPO}, compiling takes minutes", flush=True)
    # Its build imports torch, hence no isolation, and its model zoo needs pkg_resources, which
    # setuptools 82 dropped.
    pip("install", "setuptools>=64,<81", "wheel", "ninja", verbose=verbose)
    with tempfile.TemporaryDirectory(prefix="detectron2-") as workdir:
        build = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", workdir)
        pip(*build, f"git+{REPO}@{COMMIT}", verbose=verbose, timeout=GIT_SECONDS)
        install_wheel(next(Path(workdir).glob("detectron2-*.whl")), verbose)
    ok, reason = python("import torch; from detectron2 import _C; import detectron2.engine")
    if not ok:
        raise InstallError(f"the compiled Detectron2 does not work: {reason}")


def install_pure(verbose=False):
    """Makes and installs the pure-Python wheel of v0.6."""
    with tempfile.TemporaryDirectory(prefix="detectron2-") as workdir:
        print("making a pure-Python wheel of Detectron2 v0.6", flush=True)
        install_wheel(make_wheel(workdir), verbose)


SOURCES = {"git": install_git, "pure": install_pure}


def install(source="auto", verbose=False):
    """Tries the sources in turn; raises InstallError that names every failure and the mend."""
    failures = []
    for name in SOURCES if source == "auto" else [source]:
        try:
            SOURCES[name](verbose)
            return name
        except InstallError as err:
            print(f"{name}: {err}", flush=True)
            failures.append(f"{name}: {err}")
    raise InstallError(f"Detectron2 could not be installed ({'; '.join(failures)}); {MEND}")


def main(argv=None):
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", choices=("auto", *SOURCES), default="auto")
    parser.add_argument("--verbose", action="store_true", help="let pip's output through")
    args = parser.parse_args(argv)
    try:
        present = describe() if args.source == "auto" else None
        if present:
            print(f"already installed: {present}")
            return 0
        ok, reason = python("import torch, torchvision")
        if not ok:
            raise InstallError(
                f"torch and torchvision do not import in {sys.executable} ({reason});"
                " install them first: pip install torch torchvision"
            )
        install(args.source, args.verbose)
        present = describe()
        if not present:
            _, reason = python("import detectron2.layers")
            raise InstallError(f"Detectron2 was installed but does not import: {reason}")
    except InstallError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    print(f"installed: {present}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
