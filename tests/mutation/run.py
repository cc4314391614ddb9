r"""Puts faults into a copy of the code, one at a time, and says which of them no test notices.

    pip install cosmic-ray
    python tests/mutation/run.py layers data --sample 50 --seed 1

draws 50 faults in each of the packages that config.toml names (all of them without names), by
cosmic-ray's operators and those in operators.py. The seed decides on the draw. A fault in a line
is tried on the tests that ran the line, quickest first, then on the package's own; which ones ran
it, and how long they take, is read from --map, a folder that this fills:

    COVERAGE_FILE=.cache/map/coverage python -m pytest --all --cov=wsbcn_d2 --cov-context=test \
        --cov-report= --junitxml=.cache/map/tests.xml

Of the package's tests, those files come first that speak of what is around the line. Survivors are
printed as changes of a line; equivalent.txt lists those that change nothing a user could see, each
with the reason.

    python tests/mutation/run.py --by-hand [TEXT] [--faults FILE]

tries the faults of by_hand.toml, or of another file like it, where a fault that names no tests is
tried as those that are drawn.

Everything heavy is imported once: each try is a fork of this process, in a group of its own.
"""

import argparse
import ast
import collections
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CONFIG = tomllib.loads((HERE / "config.toml").read_text())


def tracked():
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    return [name for name in listed.stdout.decode().splitlines() if (ROOT / name).exists()]


def sources(package):
    options = CONFIG["packages"][package]
    found = {path for pattern in options["code"] for path in ROOT.glob(pattern)}
    found -= {path for pattern in options.get("without", ()) for path in ROOT.glob(pattern)}
    return sorted(str(path.relative_to(ROOT)) for path in found)


def faults(path):
    """(place, operator, which of its occurrences) of every fault that could be put into a file."""
    from cosmic_ray.ast import Visitor, get_ast
    from cosmic_ray.operators.provider import _OPERATORS
    from operators import OPERATORS

    code = (ROOT / path).read_text()

    class Positions(Visitor):
        def __init__(self, operator):
            self.operator, self.found = operator, []

        def visit(self, node):
            self.found += list(self.operator.mutation_positions(node))
            return node

    silent = set()  # what no test could see: annotations, messages of errors, __all__
    for node in ast.walk(ast.parse(code)):
        hidden = []
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation:
            hidden = [node.annotation]
        elif isinstance(node, ast.FunctionDef) and node.returns:
            hidden = [node.returns]
        elif isinstance(node, ast.Raise):
            hidden = [node.exc] if node.exc else []
        elif isinstance(node, ast.Assign | ast.If):
            head = ast.unparse(node.test if isinstance(node, ast.If) else node.targets[0])
            hidden = [node] if head in ("__all__", "TYPE_CHECKING") else []
        for part in hidden:
            for inner in ast.walk(part):
                if hasattr(inner, "col_offset"):
                    silent.add((inner.lineno, inner.col_offset))
    wanted = [_OPERATORS[name] for name in CONFIG["operators"]] + list(OPERATORS)
    for operator in (kind() for kind in wanted):
        seen = Positions(operator)
        seen.walk(get_ast(code))
        for occurrence, (start, _) in enumerate(seen.found):
            if tuple(start) not in silent:
                yield start, operator, occurrence


def changed(path, operator, occurrence):
    """The file with the fault, or None where that is the same program, or none."""
    from cosmic_ray.mutating import mutate_code

    code = (ROOT / path).read_text()
    result = mutate_code(code, operator, occurrence)
    try:
        same = result is None or ast.dump(ast.parse(result)) == ast.dump(ast.parse(code))
    except SyntaxError:
        return None
    return None if same else result


def drawn(package, count, randomness):
    """A sample that is even over places in the code, however many operators apply at each."""
    places = collections.defaultdict(list)
    for path in sources(package):
        for start, *fault in faults(path):
            places[path, start].append(fault)
    order = sorted(places)
    randomness.shuffle(order)
    found = []
    for path, start in order:
        operator, occurrence = randomness.choice(places[path, start])
        text = changed(path, operator, occurrence)
        if text is not None:
            found.append((path, start, type(operator).__name__, text))
        if len(found) == count:
            break
    return found


def change(path, text):
    """(before, after) in one line each."""
    old, new = (ROOT / path).read_text().splitlines(), text.splitlines()
    first = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), len(new))
    after = [line for line in new[first : len(new) - (len(old) - first - 1)]]
    return old[first].strip(), " ".join(line.strip() for line in after[:2])


class Tests:
    """Which tests ran a line, and what each takes."""

    def __init__(self, folder):
        self.by_line, self.seconds = collections.defaultdict(set), {}
        for results in folder.glob("*.xml"):
            for case in ElementTree.parse(results).iter("testcase"):
                where = case.get("classname").replace(".", "/") + ".py"
                self.seconds[f"{where}::{case.get('name')}"] = float(case.get("time"))
        for data in folder.glob("*coverage"):
            from coverage.numbits import numbits_to_nums

            rows = sqlite3.connect(data).execute(
                "select file.path, context.context, numbits from line_bits"
                " join file on file.id = file_id join context on context.id = context_id"
            )
            for path, context, bits in rows:
                if name := context.rpartition("|")[0]:  # an id may have bars of its own
                    self.seconds.setdefault(name, 1.0)
                    for line in numbits_to_nums(bits):
                        self.by_line[path.rpartition("/wsbcn_d2/")[2], line].add(name)

    def of(self, package, path, line, budget):
        """Arguments for pytest, one list after the other: the quickest of the tests that ran the
        line; then the others of them, and the package's files, first those that speak of it."""
        ran = self.by_line[path.rpartition("wsbcn_d2/")[2], line]
        names = sorted((n for n in ran if (ROOT / n.partition("::")[0]).exists()), key=self.cost)
        kept = []
        for name in names:
            budget -= self.seconds[name]
            if budget > 0 or not kept:
                kept.append(name)
        if len(names) > 2:
            yield kept
            names = names[len(kept) :]
        patterns = CONFIG["packages"][package]["tests"]
        found = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
        files = [f for p in found for f in ([p] if p.is_file() else sorted(p.rglob("test_*.py")))]
        words = [Path(path).stem.lstrip("_"), *enclosing(path, line)]
        speak = {f: sum(w in f.read_text() or w in f.stem for w in words) for f in files}
        files = sorted(files, key=lambda f: (-speak[f], f.stat().st_size))
        quick = [] if CONFIG["packages"][package].get("slow") else ["-m", "not slow"]
        yield [*quick, *names, *(str(f.relative_to(ROOT)) for f in files)]

    def cost(self, name):
        return self.seconds[name], name


def enclosing(path, line):
    """Names of the functions and classes around a line, and of what is assigned there."""
    if not path.endswith(".py"):
        return
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if getattr(node, "lineno", line + 1) <= line <= (getattr(node, "end_lineno", 0) or 0):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield node.name.lstrip("_")
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                yield node.targets[0].id.lstrip("_")


def attempt(copy, names, timeout):
    """What pytest says of the copy: "noticed", "survived" or "too slow"."""
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        code = 70
        try:
            os.setpgid(0, 0)
            os.chdir(copy)
            output = os.open("pytest.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1), os.dup2(output, 2)
            sys.path.insert(0, str(copy))
            os.environ.update(PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE="1")
            import pytest

            code = pytest.main(
                ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:cov", "-p", "no:xdist", *names]
            )
        finally:
            os._exit(code)
    deadline = time.monotonic() + timeout
    try:
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                if code == 4 and "ImportError" not in (copy / "pytest.log").read_text():
                    return "no tests"
                return "survived" if code in (0, 5) else "noticed"
            time.sleep(0.05)
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return "too slow"
    finally:
        with contextlib.suppress(ProcessLookupError):  # what the tests have left running
            os.killpg(pid, signal.SIGKILL)


def by_hand(copy, file, text, timeout, tests, budget):
    """Tries the faults of a file like by_hand.toml that have a text in what they are."""
    for fault in tomllib.loads(file.read_text())["fault"]:
        path, code = fault["file"], (ROOT / fault["file"]).read_text()
        if text not in fault["what"]:
            continue
        if fault["before"] not in code:
            print(f"gone: {fault['what']}: {path} has no such text", flush=True)
            continue
        changed = code.replace(fault["before"], fault["after"], 1)
        lists = [fault.get("tests")]
        if lists == [None]:
            pairs = enumerate(zip(code.splitlines(), changed.splitlines(), strict=False), 1)
            line = next(number for number, (old, new) in pairs if old != new)
            lists = tests.of(fault.get("package") or package_of(path), path, line, budget)
        result = tried(copy, path, changed, lists, timeout)
        print(f"{result}: {fault['what']}", flush=True)


def package_of(path):
    """The first package of config.toml that a file belongs to."""
    return next(package for package in CONFIG["packages"] if path in sources(package))


def tried(copy, path, text, lists, timeout):
    """What the tests say of the copy with another text in one of its files, list after list."""
    before = (copy / path).read_text()
    (copy / path).write_text(text)
    try:
        for names in lists:
            result = attempt(copy, names, timeout)
            if result not in ("survived", "no tests"):
                break
        return result
    finally:
        (copy / path).write_text(before)


def import_what_the_tests_import():
    """All of it but the code itself: forks have it then."""
    code = "import sys, conftest, wsbcn_d2.study, wsbcn_d2.cli.predict, wsbcn_d2.engine.lazy"
    code += ", hypothesis, PIL.PngImagePlugin, matplotlib.backends.backend_agg; print(*sys.modules)"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    listed = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True
    )
    for name in listed.stdout.decode().splitlines()[-1].split():
        if name.partition(".")[0] not in ("wsbcn_d2", "conftest", "__main__"):
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def equivalents():
    listed = (HERE / "equivalent.txt").read_text().splitlines()
    return {line.partition("  # ")[0].strip() for line in listed if line and line[0] != "#"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", nargs="*", default=list(CONFIG["packages"]))
    parser.add_argument("--sample", type=int, default=50, help="faults in each package")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--map", type=Path, default=ROOT / ".cache" / "map")
    parser.add_argument("--budget", type=float, default=60, help="seconds of the tests tried first")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one fault")
    parser.add_argument(
        "--by-hand", nargs="?", const="", metavar="TEXT",
        help="the faults of by_hand.toml alone, or those of them with a text in what they are",
    )  # fmt: skip
    parser.add_argument(
        "--faults", type=Path, default=HERE / "by_hand.toml",
        help="another file of that form; without tests a fault is tried as those that are drawn",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="show the draw, try nothing")
    parser.add_argument("--output", type=Path, help="a file for one JSON line per fault")
    args = parser.parse_args()
    sys.path.insert(0, str(HERE))
    tests, known = Tests(args.map), equivalents()
    if not args.list:
        import_what_the_tests_import()
    folder = Path(tempfile.mkdtemp(prefix="mutation-"))
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    if args.by_hand is not None:
        by_hand(folder, args.faults, args.by_hand, args.limit, tests, args.budget)
        args.packages = []
    for package in args.packages:
        counts = collections.Counter()
        draw = drawn(package, args.sample, random.Random(f"{package} {args.seed}"))
        for path, (line, column), operator, text in draw:
            before, after = change(path, text)
            what = f"{path}: {before} -> {after}"
            if args.list:
                print(f"{path}:{line}:{column} {operator}: {before} -> {after}")
                continue
            began = time.monotonic()
            lists = tests.of(package, path, line, args.budget)
            result = tried(folder, path, text, lists, args.limit)
            if result == "survived" and what in known:
                result = "equivalent"
            counts[result] += 1
            seconds = time.monotonic() - began
            if result in ("survived", "equivalent"):
                print(f"{result}: {path}:{line} {operator}: {before} -> {after}", flush=True)
            if args.output:
                row = {"package": package, "result": result, "path": path, "line": line}
                row |= {"operator": operator, "before": before, "after": after}
                row |= {"seconds": round(seconds, 1)}
                with args.output.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")
        found = counts["noticed"]
        real = found + counts["survived"]  # what was cut off is undecided
        if real:
            print(f"{package}: {found} of {real} noticed ({found / real:.0%}), {dict(counts)}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
