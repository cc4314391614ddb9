"""Tools that install Detectron2, on the real archive, and check the environment."""

import ast
import base64
import copy
import difflib
import hashlib
import importlib.util
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from wsbcn_d2.files import replacing

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools" / "install"


def load(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


wheel = load("detectron2_wheel")
installer = load("install_detectron2")
env_check = load("env_check")
stub = load("detectron2_stub")
InstallError = wheel.InstallError


@pytest.fixture(scope="session")
def sdist():
    """The real archive: kept from an earlier run, or downloaded as the installer does it."""
    kept = ROOT / ".cache" / f"{wheel.SDIST_NAME}-{wheel.SDIST_VERSION}.tar.gz"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = wheel.download_sdist(folder)
            except InstallError as error:
                if "WSBCN_CI" in os.environ:
                    raise
                pytest.skip(str(error))
            wheel.verify_sha256(found)
            with replacing(kept) as part:
                shutil.copy(found, part)
    wheel.verify_sha256(kept)
    return kept


@pytest.fixture
def tree(sdist, tmp_path):
    """What the real archive holds."""
    return wheel.unpack(sdist, tmp_path / "unpacked")


def make_sdist(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


# Lines that differ after patching, besides the notice; counted in the v0.6 sources by hand.
CHANGED = {
    "data/build.py": 2,
    "data/datasets/pascal_voc.py": 1,
    "data/transforms/transform.py": 1,
    "evaluation/coco_evaluation.py": 1,
    "evaluation/pascal_voc_evaluation.py": 2,
    "evaluation/sem_seg_evaluation.py": 7,
    "export/__init__.py": 1,
    "layers/nms.py": 1,
    "model_zoo/model_zoo.py": 3,
    "structures/masks.py": 3,
    "utils/video_visualizer.py": 1,
    "utils/visualizer.py": 3,
}
OLD = re.compile(r"\bnp\.(bool|int|float|str|object|complex)\b|Image\.LINEAR|pkg_resources")


def read(tree):
    files = sorted((tree / "detectron2").rglob("*.py"))
    return {path.relative_to(tree / "detectron2").as_posix(): path.read_text() for path in files}


def test_the_real_tree_is_patched_in_these_lines_alone(tree):
    before = read(tree)
    assert sum(len(OLD.findall(text)) for text in before.values()) == 22
    wheel.patch_tree(tree)
    after = read(tree)
    assert after.pop("_C.py") == wheel.STUB.read_text()
    changed = {name for name in before if before[name] != after[name]}
    assert before.keys() == after.keys() and changed == CHANGED.keys()
    for name in changed:
        notice, _, text = after[name].partition("\n")
        assert notice + "\n" == wheel.NOTICE
        lines = difflib.ndiff(before[name].splitlines(), text.splitlines())
        assert sum(line.startswith("- ") for line in lines) == CHANGED[name], name
        ast.parse(text)
    assert not [name for name, text in after.items() if OLD.search(text)]


@pytest.mark.parametrize("count, refused", [(0, True), (1, True), (2, False), (3, True)])
def test_a_patch_is_for_so_many_places(tmp_path, count, refused):
    (tmp_path / "detectron2").mkdir()
    file = tmp_path / "detectron2" / "a.py"
    file.write_text("old\n" * count)
    if refused:
        with pytest.raises(InstallError, match=f"a.py: expected 2 x 'old', found {count};"):
            wheel.patch_tree(tmp_path, patches=[("a.py", "old", "new", 2)])
        assert not (tmp_path / "detectron2" / "_C.py").exists()
    else:
        wheel.patch_tree(tmp_path, patches=[("a.py", "old", "new", 2)])
        assert file.read_text() == wheel.NOTICE + "new\nnew\n"


@pytest.mark.parametrize("text", ["something else\n", None])
def test_patch_of_unexpected_text_names_the_file(tree, text):
    target = tree / "detectron2/utils/visualizer.py"
    target.unlink() if text is None else target.write_text(text)
    with pytest.raises(InstallError, match=r"utils/visualizer.py: expected 3 x .* found 0"):
        wheel.patch_tree(tree)


def test_patching_twice_is_refused(tmp_path):
    (tmp_path / "detectron2").mkdir()
    wheel.patch_tree(tmp_path, patches=())
    with pytest.raises(InstallError, match="already"):
        wheel.patch_tree(tmp_path, patches=())


def test_wrong_checksum_stops_before_anything_is_unpacked(tmp_path, monkeypatch):
    bad = make_sdist(tmp_path / "bad.tar.gz", {"top/detectron2/__init__.py": ""})
    pip_calls = []
    monkeypatch.setattr(wheel, "download_sdist", lambda workdir: bad)
    monkeypatch.setattr(wheel, "unpack", lambda *a: pytest.fail("unpacked an unverified file"))
    monkeypatch.setattr(installer, "pip", lambda *a, **k: pip_calls.append(a))
    with pytest.raises(InstallError, match=r"bad.tar.gz .*sha256 .*expected 5d2e9e51"):
        installer.install("pure")
    assert not pip_calls


@pytest.fixture(params=["filters", "no filters"])
def any_tarfile(request, monkeypatch):
    """Python's module, with the extraction filters of newer versions and without."""
    if request.param == "no filters":
        monkeypatch.delattr(tarfile, "data_filter", raising=False)


@pytest.mark.usefixtures("any_tarfile")
def test_unpacking(tmp_path):
    archive = make_sdist(tmp_path / "x.tar.gz", {"top/detectron2/a.py": "x = 1"})
    top = wheel.unpack(archive, tmp_path / "out")
    assert (top / "detectron2/a.py").read_text() == "x = 1"


@pytest.mark.usefixtures("any_tarfile")
@pytest.mark.parametrize("name", ["../evil.py", "top/../../evil.py", "/{}/evil.py", "link"])
def test_unsafe_member_is_refused(tmp_path, name):
    name = name.format(tmp_path)
    archive = tmp_path / "x.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("top/detectron2/a.py"))
        info = tarfile.TarInfo(name)
        if name == "link":
            info.type, info.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(info)
    with pytest.raises(InstallError, match="cannot be unpacked safely"):
        wheel.unpack(archive, tmp_path / "out")
    assert not (tmp_path / "evil.py").exists() and not (tmp_path / "out").exists()


def test_other_package_is_refused(tmp_path):
    archive = make_sdist(tmp_path / "x.tar.gz", {"top/other/a.py": ""})
    with pytest.raises(InstallError, match="holds no detectron2 folder"):
        wheel.unpack(archive, tmp_path / "out")


def test_failed_download_gives_pips_reason(tmp_path, monkeypatch):
    def run(command, **kwargs):
        error = "WARNING: retrying\nERROR: No matching distribution found\nhint: none\n"
        return subprocess.CompletedProcess(command, 1, "", error)

    monkeypatch.setattr(wheel.subprocess, "run", run)
    with pytest.raises(InstallError, match="could not download .*No matching distribution found$"):
        wheel.download_sdist(tmp_path)


def test_the_download_is_one_file_of_one_digest(tmp_path, monkeypatch):
    """And no code of it runs: pip checks the file before it asks for anything in it."""
    calls = []

    def run(command, **kwargs):
        calls.append((command, kwargs["env"]))
        Path(command[command.index("--dest") + 1], "pb1-detectron2-0.6.tar.gz").touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheel.subprocess, "run", run)
    assert wheel.download_sdist(tmp_path) == tmp_path / "pb1-detectron2-0.6.tar.gz"
    ((command, env),) = calls
    digest = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
    requirement = Path(command[command.index("-r") + 1]).read_text()
    assert requirement == f"pb1-detectron2==0.6 --hash=sha256:{digest}\n"
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
    assert command[command.index("--no-binary") + 1] == "pb1-detectron2"
    assert "--no-build-isolation" in command  # the backend is ours
    assert (Path(env["PYTHONPATH"]) / "setuptools" / "build_meta.py").is_file()


def test_stand_in_backend_answers_for_the_sdist(tmp_path):
    namespace = {}
    exec(wheel._BACKEND, namespace)
    backend = namespace["__legacy__"]
    assert backend.get_requires_for_build_wheel() == []
    name = backend.prepare_metadata_for_build_wheel(str(tmp_path))
    assert "Name: pb1-detectron2\nVersion: 0.6\n" in (tmp_path / name / "METADATA").read_text()


# What Detectron2 v0.6 needs at run time, from its own setup.py.
NEEDED = {
    *("Pillow", "matplotlib", "pycocotools", "termcolor", "yacs", "tabulate", "cloudpickle"),
    *("tqdm", "tensorboard", "fvcore", "iopath", "omegaconf", "hydra-core"),
}


@pytest.mark.slow
def test_the_real_wheel_is_complete_and_works(tree, tmp_path):
    files = {p.relative_to(tree).as_posix() for p in tree.rglob("detectron2/**/*.py")}
    files |= {p.relative_to(tree).as_posix() for p in tree.rglob("detectron2/**/*.yaml")}
    assert len(files) > 250
    wheel.patch_tree(tree)
    path = wheel.build_wheel(tree, tmp_path)
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        info = archive.read("detectron2-0.6+pure.dist-info/METADATA").decode()
        record = archive.read("detectron2-0.6+pure.dist-info/RECORD").decode().splitlines()
        assert {line.partition(",")[0] for line in record} == names
        for name, digest, size in (line.split(",") for line in record[:-1]):
            data = archive.read(name)
            encoded = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()
            assert (digest, size) == (f"sha256={encoded.rstrip('=')}", str(len(data))), name
    assert files <= names
    assert {
        "detectron2/_C.py",
        "detectron2/projects/point_rend/__init__.py",
        "detectron2/projects/deeplab/__init__.py",
        "detectron2/projects/panoptic_deeplab/__init__.py",
        "detectron2-0.6+pure.dist-info/LICENSE",
    } <= names
    needed = re.findall(r"^Requires-Dist: ([\w-]+)", info, re.MULTILINE)
    assert set(needed) == NEEDED and len(needed) == len(NEEDED)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", tmp_path / "site", path], check=True)
    script = """
import detectron2, sys, torch
from detectron2 import model_zoo
from detectron2.layers import batched_nms_rotated, nms
from detectron2.modeling import build_model
assert detectron2.__file__.startswith(sys.argv[1])
cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
with torch.no_grad():
    found = build_model(cfg).eval()([{"image": torch.zeros(3, 32, 32)}])
print(type(found[0]["instances"]).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, tmp_path / "site"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["Instances"], done.stderr


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("box_iou_rotated", "rotated boxes"),
        ("modulated_deform_conv_forward", "deformable convolutions"),
        ("COCOevalEvaluateImages", "use_fast_impl=False"),
        ("something_new", "an operation"),
    ],
)
def test_stub_names_what_is_missing(name, what):
    with pytest.raises(NotImplementedError, match=rf"_C\.{name} is missing.*{what}"):
        getattr(stub, name)
    assert not hasattr(stub, name)


def test_stub_survives_probes():
    assert not hasattr(stub, "__wrapped__")
    with pytest.raises(AttributeError, match="no attribute '__wrapped__'") as error:
        _ = stub.__wrapped__
    assert type(error.value) is AttributeError
    assert inspect.getmodule(stub.has_cuda) is stub
    assert copy.copy(stub.__dict__)["__name__"] == "detectron2_stub"
    assert stub.get_cuda_version() and stub.get_compiler_version() and not stub.has_cuda()


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (FileNotFoundError("git"), "git is not installed"),
        (subprocess.TimeoutExpired("git", 10), "did not answer within 10 s"),
        (128, "cannot be reached: fatal: no such host"),
    ],
)
def test_unreachable_git_falls_through_to_pure(monkeypatch, capsys, failure, reason):
    def run(command, **kwargs):
        assert command[0] == "git" and kwargs["env"]["GIT_TERMINAL_PROMPT"] == "0"
        assert kwargs["timeout"] == 10
        if isinstance(failure, Exception):
            raise failure
        return subprocess.CompletedProcess(command, failure, "", "fatal: no such host\n")

    monkeypatch.setattr(installer.subprocess, "run", run)
    monkeypatch.setitem(installer.SOURCES, "pure", lambda verbose: None)
    assert installer.install("auto") == "pure"
    assert reason in capsys.readouterr().out


def test_a_pip_that_hangs_is_given_up(monkeypatch):
    def run(command, **kwargs):
        assert command[1:4] == ["-m", "pip", "wheel"]
        raise subprocess.TimeoutExpired(command, kwargs["timeout"])

    monkeypatch.setattr(installer.subprocess, "run", run)
    with pytest.raises(InstallError, match="pip wheel took longer than 7 s"):
        installer.pip("wheel", "x", timeout=7)


def test_the_official_commit_has_an_hour_to_compile(monkeypatch):
    calls = []

    def pip(*args, **kwargs):
        calls.append((args, kwargs))
        if args[0] == "wheel":
            raise InstallError("enough")

    monkeypatch.setattr(installer, "probe_git", lambda: None)
    monkeypatch.setattr(installer, "pip", pip)
    with pytest.raises(InstallError, match="enough"):
        installer.install_git()
    # Its model zoo imports pkg_resources, which later versions of setuptools lack.
    assert calls[0][0] == ("install", "setuptools>=64,<81", "wheel", "ninja")
    args, kwargs = calls[-1]
    assert args[:3] == ("wheel", "--no-deps", "--no-build-isolation")
    url = "git+https://github.com/facebookresearch/detectron2.git@"
    assert args[-1] == url + "02b5c4e295e990042a714712c21dc79b731e8833"
    assert kwargs["timeout"] == 3600


def test_a_wheel_replaces_what_is_there_and_brings_its_requirements(monkeypatch):
    calls = []
    monkeypatch.setattr(installer, "pip", lambda *args, verbose: calls.append((args, verbose)))
    installer.install_wheel(Path("a.whl"), verbose=True)
    assert calls == [
        (("install", "--force-reinstall", "--no-deps", "a.whl"), True),
        (("install", "a.whl"), True),
    ]


def test_what_is_run_asks_nothing(monkeypatch):
    seen = []
    monkeypatch.setattr(
        installer.subprocess, "run", lambda command, **kwargs: seen.append((command, kwargs))
    )
    installer.run(["git", "x"], timeout=3)
    ((command, options),) = seen
    assert command == ["git", "x"] and options["timeout"] == 3 and options["capture_output"]
    assert options["stdin"] is subprocess.DEVNULL
    assert (options["env"]["GIT_TERMINAL_PROMPT"], options["env"]["GIT_ASKPASS"]) == ("0", "true")


def test_failed_compilation_falls_through_to_pure(monkeypatch, capsys):
    def pip(*args, **kwargs):
        raise InstallError("pip install failed: error: command 'g++' failed")

    monkeypatch.setattr(installer, "probe_git", lambda: None)
    monkeypatch.setattr(installer, "pip", pip)
    monkeypatch.setitem(installer.SOURCES, "pure", lambda verbose: None)
    assert installer.install("auto") == "pure"
    assert "git: pip install failed" in capsys.readouterr().out


def test_total_failure_is_one_line_with_every_reason_and_the_mend(monkeypatch, capsys):
    def fail(verbose):
        raise InstallError("reason")

    for name in installer.SOURCES:
        monkeypatch.setitem(installer.SOURCES, name, fail)
    monkeypatch.setattr(installer, "describe", lambda: None)
    monkeypatch.setattr(installer, "python", lambda code: (True, ""))
    assert installer.main([]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "git: reason; pure: reason" in lines[0] and "PIP_FIND_LINKS" in lines[0]


def test_missing_torch_is_said_first(monkeypatch, capsys):
    monkeypatch.setattr(installer, "describe", lambda: None)
    monkeypatch.setattr(installer, "python", lambda code: (False, "No module named 'torch'"))
    assert installer.main([]) == 1
    assert "install them first" in capsys.readouterr().err


def test_nothing_to_do_where_detectron2_imports(capsys, monkeypatch):
    monkeypatch.setattr(installer, "install", lambda *a: pytest.fail("installed again"))
    assert installer.main([]) == 0
    assert capsys.readouterr().out.startswith("already installed: Detectron2 ")


@pytest.mark.parametrize(
    "said, expected",
    [
        ((True, "0.6|/d2/_C.cpython-311.so|/d2"), "Detectron2 0.6, compiled (/d2)"),
        (
            (True, "0.6|/d2/_C.py|/d2"),
            f"Detectron2 0.6, pure Python: {installer.LACKS} (/d2)",
        ),
        ((True, "0.6||/d2"), f"Detectron2 0.6, pure Python: {installer.LACKS} (/d2)"),
        ((False, "No module named 'detectron2'"), None),
    ],
)
def test_what_is_installed_is_said(said, expected, monkeypatch):
    monkeypatch.setattr(installer, "python", lambda code: said)
    assert installer.describe() == expected


def test_code_is_tried_away_from_the_checkout(monkeypatch):
    """Where a folder named detectron2 or torch would be imported."""
    monkeypatch.chdir(ROOT)
    ok, folder = installer.python("import os; print('x'); print(os.getcwd())")
    assert ok and os.path.samefile(folder, tempfile.gettempdir())
    assert installer.python("raise ValueError('no')") == (False, "ValueError: no")


@pytest.mark.parametrize(
    "version, problem",
    [("2.11.0a0+git1", None), ("2.10.0", None), ("2.9.1", "is needed, 2.9.1 is")],
)
def test_torch_of_the_night_serves_too(version, problem, monkeypatch):
    monkeypatch.setattr(env_check.metadata, "version", lambda name: version)
    found = env_check.problem("torch>=2.10")
    assert found is None if problem is None else problem in found


def test_env_check_reads_setup_and_judges_versions(tmp_path):
    requirements = env_check.read_requirements(["vis", "dev"])
    assert any(r.startswith("torch>=") for r in requirements)
    assert any(r.startswith("ruff") for r in requirements)
    assert env_check.problem("numpy>=1.0") is None
    assert "is needed" in env_check.problem("numpy>=999")
    assert "is missing" in env_check.problem("no-such-distribution-here>=1")


def test_env_check_says_what_is_missing_by_its_exit_code(monkeypatch, capsys):
    wanted = []
    monkeypatch.setattr(env_check, "read_requirements", lambda extras: wanted)
    assert env_check.main([]) == 0 and capsys.readouterr().out == ""
    wanted += ["numpy>=1.0", "no-such-distribution-here", "nor-this-one"]
    assert env_check.main([]) == 1
    assert capsys.readouterr().out == "no-such-distribution-here is missing\n"
    wanted.clear()
    monkeypatch.setitem(sys.modules, "torchvision", None)  # which makes its import fail
    assert env_check.main([]) == 1
    assert capsys.readouterr().out.startswith("torchvision does not import: ")


def bash(script, **env):
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env={**os.environ, **env}
    )
    return done.returncode, done.stdout.strip(), done.stderr.strip()


@pytest.mark.parametrize(
    "version, serves", [("(3, 9, 18)", 1), ("(3, 10, 0)", 0), ("(3, 13, 1)", 0), ("(2, 7)", 1)]
)
def test_pythons_that_are_new_enough(tmp_path, version, serves):
    """Each said by an interpreter that claims its version."""
    fake = tmp_path / "python3"
    change = f"import sys; sys.version_info = {version}; exec(sys.argv[1])"
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} -S -c "{change}" "$2"\n')
    fake.chmod(0o755)
    assert bash(f"source {TOOLS}/setup_env.sh; _setup_new_enough {fake}")[0] == serves
    text = f"source {TOOLS}/setup_env.sh; _setup_find_python && echo found $_setup_base"
    code, said, error = bash(text, WSBCN_PYTHON=str(fake))
    assert (code, said) == ((1, "") if serves else (0, f"found {fake}"))
    assert not serves or "Python 3.10 or newer is needed" in error


STAMPED = ["setup.py"] + [
    f"tools/install/{name}"
    for name in (
        "setup_env.sh",
        "install_detectron2.py",
        "detectron2_wheel.py",
        "detectron2_stub.py",
    )
]


def test_an_environment_is_made_anew_when_what_it_is_made_of_changes(tmp_path):
    for name in STAMPED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    python = tmp_path / "venv" / "bin" / "python"

    def stamp(torch="torch==1", version="3.11"):
        python.write_text(f"#!/bin/sh\necho Python {version}\n")
        python.chmod(0o755)
        text = f"source {tmp_path}/tools/install/setup_env.sh; _setup_venv={tmp_path}/venv"
        code, said, error = bash(f"{text} _setup_torch=({torch}); _setup_stamp_value")
        assert code == 0 and said and not error
        return said

    stamps = [stamp(), stamp("torch==2"), stamp(version="3.12")]
    assert stamp() == stamps[0]
    for name in STAMPED:
        with (tmp_path / name).open("a") as file:
            file.write("# changed\n")
        stamps.append(stamp())
    assert len(set(stamps)) == len(stamps)


def test_the_demo_reports_the_last_evaluation(tmp_path, monkeypatch, capsys):
    report = load("demo_report")
    rows = [
        {"iteration": i, f"{task}/{name}": value + less}
        for i, value in ((9, 1.0), (19, 20.0))
        for task, less in (("bbox", 0.5), ("segm", 0.25))
        for name in ("AP", "AP50", "AP75")
    ]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, rows)))
    drawn = []
    monkeypatch.setattr(
        report,
        "draw_predictions",
        lambda cfg, folder: drawn.append((cfg.MODEL.WEIGHTS, folder)) or ["a.png", "b.png"],
    )
    config = str(ROOT / "configs" / "shapes" / "mask_rcnn_R_18_FPN_bcn_ws.yaml")
    argv = ["demo_report.py", "--config-file", config, "OUTPUT_DIR", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    assert report.main() == 2
    assert "holds no model_final.pth: train first" in capsys.readouterr().err
    (tmp_path / "model_final.pth").touch()
    assert report.main() == 0
    said = capsys.readouterr().out
    assert re.search(r"^bbox +20\.5 +20\.5 +20\.5$", said, re.MULTILINE)
    assert re.search(r"^segm +20\.2 +20\.2 +20\.2$", said, re.MULTILINE)
    assert "a.png and 1 more" in said and "shapes_val" in said
    assert drawn == [(str(tmp_path / "model_final.pth"), str(tmp_path / "predictions"))]
    assert (tmp_path / "curves.png").is_file()


def test_the_package_contains_its_kernels(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True)
    assert (tmp_path / "wsbcn_d2/layers/kernels/cpu.cpp").is_file()


@pytest.fixture
def steps(monkeypatch):
    """Nothing is installed: what would have been done, and what is there afterwards."""
    done, there = [], ["Detectron2 0.6"]
    for name in installer.SOURCES:
        monkeypatch.setitem(
            installer.SOURCES, name, lambda verbose, n=name: done.append((n, verbose))
        )
    monkeypatch.setattr(installer, "describe", lambda: there[0])
    monkeypatch.setattr(installer, "python", lambda code: (there[0] is not None, code[:20]))
    return done, there


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], []),
        (["--source", "auto"], []),
        (["--source", "git"], [("git", False)]),
        (["--source", "pure", "--verbose"], [("pure", True)]),
    ],
)
def test_an_explicit_source_is_installed_whatever_there_is(steps, words, expected, capsys):
    done, _ = steps
    assert installer.main(words) == 0 and done == expected
    said = "installed" if expected else "already installed"
    assert capsys.readouterr().out == f"{said}: Detectron2 0.6\n"


def test_what_is_installed_has_to_work(steps, monkeypatch, capsys):
    _, there = steps
    there[0] = None
    monkeypatch.setattr(
        installer, "python", lambda code: (code == "import torch, torchvision", "a reason")
    )
    assert installer.main([]) == 1
    error = "error: Detectron2 was installed but does not import: a reason\n"
    assert capsys.readouterr().err == error
    monkeypatch.setattr(installer, "probe_git", lambda: None)
    monkeypatch.setattr(installer, "install_wheel", lambda *args: None)

    def pip(*args, **options):
        if args[0] == "wheel":
            (Path(args[args.index("--wheel-dir") + 1]) / "detectron2-0.6-x.whl").touch()

    monkeypatch.setattr(installer, "pip", pip)
    with pytest.raises(InstallError, match="^the compiled Detectron2 does not work: a reason$"):
        installer.install_git()


@pytest.mark.parametrize("verbose, reason", [(True, "see above"), (False, "ERROR: the last one")])
def test_why_pip_failed(verbose, reason, monkeypatch):
    seen = []
    output = {"stdout": "error: no\nERROR: the last one\n", "stderr": "note: none\n"}

    def run(command, **options):
        seen.append((command, options))
        return SimpleNamespace(returncode=1, **output)

    monkeypatch.setattr(installer, "run", run)
    with pytest.raises(InstallError, match=f"^pip install failed: {reason}$"):
        installer.pip("install", "x", verbose=verbose)
    assert seen == [
        (
            [sys.executable, "-m", "pip", "install", "x"],
            {"capture_output": not verbose, "timeout": None},
        )
    ]


def test_which_repository_is_asked_for(monkeypatch):
    seen = []
    monkeypatch.setattr(
        installer, "run", lambda c, **k: seen.append((c, k)) or SimpleNamespace(returncode=0)
    )
    installer.probe_git()
    url = "https://github.com/facebookresearch/detectron2.git"
    assert seen == [(["git", "ls-remote", "--exit-code", url, "HEAD"], {"timeout": 10})]


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("name", ["opencv-python>=4", "opencv-python-headless"])
def test_any_opencv_will_do(name, there, monkeypatch):
    asked = []
    monkeypatch.setattr(
        env_check.importlib.util, "find_spec", lambda n: asked.append(n) or (there or None)
    )
    assert env_check.problem(name) == (None if there else "cv2 (OpenCV) is missing")
    assert asked == ["cv2"]


def test_what_is_imported_when_all_is_there(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(env_check, "read_requirements", lambda extras: asked.append(extras) or [])

    def broken(name):
        asked.append(name)
        if name == "detectron2.layers":
            raise OSError("a broken binary")

    monkeypatch.setattr(env_check.importlib, "import_module", broken)
    assert env_check.main(["vis"]) == 1
    assert capsys.readouterr().out == "detectron2.layers does not import: a broken binary\n"
    assert asked == [["vis"], "torch", "torchvision", "detectron2.layers"]


def test_requirements_of_the_wheel():
    """Those of Detectron2 v0.6 that today's libraries can meet."""
    assert set(wheel.REQUIRES) == {
        *("Pillow>=7.1", "matplotlib", "pycocotools>=2.0.2", "termcolor>=1.1", "yacs>=0.1.8"),
        *("tabulate", "cloudpickle", "tqdm>4.29.0", "tensorboard", "fvcore>=0.1.5,<0.1.6"),
        *("iopath>=0.1.7", "omegaconf>=2.1", "hydra-core>=1.1"),
    }


def test_a_wheel_has_the_same_bytes_every_time(tmp_path):
    tree = tmp_path / "tree"
    folders = ["detectron2/a", *(f"projects/{folder}" for folder in wheel.PROJECTS.values())]
    for folder in folders:
        (tree / folder).mkdir(parents=True)
        for name in ("x.py", "x.yaml", "x.pyc", "x.so"):
            (tree / folder / name).write_text(folder)
    (tree / "LICENSE").write_text("free")
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        made.append(wheel.build_wheel(tree, tmp_path / name))
        os.utime(tree / "LICENSE", (1e9, 1e9))
    assert made[0].name == made[1].name == "detectron2-0.6+pure-py3-none-any.whl"
    assert made[0].read_bytes() == made[1].read_bytes()
    with zipfile.ZipFile(made[0]) as archive:
        names = archive.namelist()
        about = archive.read("detectron2-0.6+pure.dist-info/WHEEL").decode().splitlines()
        info = archive.read("detectron2-0.6+pure.dist-info/METADATA").decode().splitlines()
    assert names[:4] == [
        *("detectron2/a/x.py", "detectron2/a/x.yaml"),
        *("detectron2/projects/point_rend/x.py", "detectron2/projects/point_rend/x.yaml"),
    ]
    assert len(names) == 2 * 4 + 4
    assert about[0] == "Wheel-Version: 1.0"
    assert about[2:] == ["Root-Is-Purelib: true", "Tag: py3-none-any"]
    assert info[:3] == ["Metadata-Version: 2.1", "Name: detectron2", "Version: 0.6+pure"]
    shutil.rmtree(tree / "projects/DeepLab")
    with pytest.raises(InstallError, match="^projects/DeepLab/deeplab is missing from the unpack"):
        wheel.build_wheel(tree, tmp_path)


@pytest.mark.parametrize(
    "text, line",
    [
        ("error: a\nERROR: b\nhint: c\n", "ERROR: b"),
        ("x\n  fatal: d \n", "fatal: d"),
        ("one\nno error here\nthe last\n\n", "the last"),
        (" \n", "no output"),
    ],
)
def test_the_line_that_says_what_went_wrong(text, line):
    assert wheel.last_error(text) == line


@pytest.mark.parametrize(
    "name, what",
    [
        *((f"{kind}_rotated_forward", "rotated boxes") for kind in ("nms", "roi_align")),
        ("deform_conv_forward", "deformable convolutions"),
        ("InstanceAnnotation", r"the C\+\+ COCOeval \(evaluate with use_fast_impl=False\)"),
    ],
)
def test_the_stub_says_what_an_operation_is_for(name, what):
    with pytest.raises(stub.MissingExtensionError, match=rf"_C\.{name} is missing: .*out {what};"):
        getattr(stub, name)
