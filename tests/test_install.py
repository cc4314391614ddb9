"""Tools that install Detectron2 and check the environment; no network, nothing is installed."""

import copy
import importlib.util
import inspect
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

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


def make_tree(root):
    """A tree with just the texts that the patches look for."""
    for name, old, _, count in wheel.PATCHES:
        path = root / "detectron2" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else "# header\n"
        path.write_text(text + "".join(f"{old}# {i}\n" for i in range(count)))
    for name in ("detectron2/__init__.py", "detectron2/model_zoo/configs/base.yaml", "LICENSE"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    for target in wheel.PROJECTS.values():
        path = root / "projects" / target / "__init__.py"
        path.parent.mkdir(parents=True)
        path.write_text("")
    return root


def make_sdist(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


def test_patches_replace_every_old_name(tmp_path):
    tree = make_tree(tmp_path)
    wheel.patch_tree(tree)
    text = "".join(p.read_text() for p in tree.rglob("*.py") if p.name != "_C.py")
    for old in ("np.bool", "np.int", "np.float", "np.str", "Image.LINEAR", "pkg_resources"):
        assert old not in text
    patched = (tree / "detectron2/structures/masks.py").read_text()
    assert patched.count(wheel.NOTICE) == 1 and patched.count("astype(bool)") == 2
    assert (tree / "detectron2/_C.py").read_text() == wheel.STUB.read_text()


@pytest.mark.parametrize("text", ["something else\n", None])
def test_patch_of_unexpected_text_names_the_file(tmp_path, text):
    tree = make_tree(tmp_path)
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


def test_stand_in_backend_answers_for_the_sdist(tmp_path):
    namespace = {}
    exec(wheel._BACKEND, namespace)
    backend = namespace["__legacy__"]
    assert backend.get_requires_for_build_wheel() == []
    name = backend.prepare_metadata_for_build_wheel(str(tmp_path))
    assert "Name: pb1-detectron2\nVersion: 0.6\n" in (tmp_path / name / "METADATA").read_text()


def test_wheel_is_complete_and_installable(tmp_path):
    tree = make_tree(tmp_path / "tree")
    wheel.patch_tree(tree)
    path = wheel.build_wheel(tree, tmp_path)
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
    assert {
        "detectron2/__init__.py",
        "detectron2/_C.py",
        "detectron2/model_zoo/configs/base.yaml",
        "detectron2/projects/point_rend/__init__.py",
        "detectron2-0.6+pure.dist-info/RECORD",
    } <= names
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", tmp_path / "site", path], check=True)
    assert (tmp_path / "site/detectron2/model_zoo/model_zoo.py").is_file()


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
        if isinstance(failure, Exception):
            raise failure
        return subprocess.CompletedProcess(command, failure, "", "fatal: no such host\n")

    monkeypatch.setattr(installer.subprocess, "run", run)
    monkeypatch.setitem(installer.SOURCES, "pure", lambda verbose: None)
    assert installer.install("auto") == "pure"
    assert reason in capsys.readouterr().out


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


def test_env_check_reads_setup_and_judges_versions(tmp_path):
    requirements = env_check.read_requirements(["vis", "dev"])
    assert any(r.startswith("torch>=") for r in requirements)
    assert any(r.startswith("ruff") for r in requirements)
    assert env_check.problem("numpy>=1.0") is None
    assert "is needed" in env_check.problem("numpy>=999")
    assert "is missing" in env_check.problem("no-such-distribution-here>=1")


def test_the_package_contains_its_kernels(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True)
    assert (tmp_path / "wsbcn_d2/layers/kernels/cpu.cpp").is_file()
