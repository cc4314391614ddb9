"""Makes a pure-Python wheel of Detectron2 v0.6 from the sdist on the package index.

The sdist holds the official Python tree and the model-zoo configs, but no C++ sources, so it
cannot be compiled. A few lines are brought up to current NumPy, Pillow and setuptools, and a stub
takes the place of the compiled extension. Every change asserts that it finds what it replaces.
Only the standard library is used, and no code of the sdist is executed.
"""

import base64
import hashlib
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

SDIST_NAME = "pb1-detectron2"
SDIST_VERSION = "0.6"
SDIST_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
WHEEL_VERSION = "0.6+pure"  # detectron2.__version__ stays "0.6"
STUB = Path(__file__).resolve().with_name("detectron2_stub.py")
NOTICE = "# Changed by wsbcn_d2's install_detectron2.py to run with current libraries.\n"

# Official v0.6 run-time requirements, without the pins that no longer install (black, iopath<)
# and without those only its Caffe2 export used (future, pydot).
REQUIRES = (
    "Pillow>=7.1",
    "matplotlib",
    "pycocotools>=2.0.2",
    "termcolor>=1.1",
    "yacs>=0.1.8",
    "tabulate",
    "cloudpickle",
    "tqdm>4.29.0",
    "tensorboard",
    "fvcore>=0.1.5,<0.1.6",
    "iopath>=0.1.7",
    "omegaconf>=2.1",
    "hydra-core>=1.1",
)
PROJECTS = {
    "point_rend": "PointRend/point_rend",
    "deeplab": "DeepLab/deeplab",
    "panoptic_deeplab": "Panoptic-DeepLab/panoptic_deeplab",
}
# (file under detectron2/, text, replacement, how often the text must occur)
PATCHES = (
    # Names that NumPy 1.24 and Pillow 10 removed; the replacements are what they were aliases of.
    ("data/build.py", "dtype=np.int)", "dtype=int)", 1),
    ("data/build.py", "dtype=np.int\n", "dtype=int\n", 1),
    ("data/datasets/pascal_voc.py", "dtype=np.str)", "dtype=str)", 1),
    ("data/transforms/transform.py", "Image.LINEAR", "Image.BILINEAR", 1),
    ("evaluation/pascal_voc_evaluation.py", "astype(np.bool)", "astype(bool)", 2),
    ("evaluation/sem_seg_evaluation.py", "dtype=np.int)", "dtype=int)", 2),
    ("evaluation/sem_seg_evaluation.py", "dtype=np.float)", "dtype=float)", 2),
    ("evaluation/sem_seg_evaluation.py", "astype(np.float)", "astype(float)", 3),
    ("structures/masks.py", "astype(np.bool)", "astype(bool)", 2),
    ("structures/masks.py", "dtype=np.bool)", "dtype=bool)", 1),
    ("utils/video_visualizer.py", "dtype=np.bool)", "dtype=bool)", 1),
    ("utils/visualizer.py", "astype(np.bool)", "astype(bool)", 3),
    # setuptools 82 comes without pkg_resources.
    ("model_zoo/model_zoo.py", "import pkg_resources\n", "", 1),
    (
        "model_zoo/model_zoo.py",
        'pkg_resources.resource_filename(\n        "detectron2.model_zoo", ',
        "os.path.join(\n        os.path.dirname(os.path.abspath(__file__)), ",
        1,
    ),
    # Without the C++ COCOeval the default evaluator takes pycocotools's, as later versions do.
    (
        "evaluation/coco_evaluation.py",
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n",
        "from pycocotools.cocoeval import COCOeval as COCOeval_opt\n",
        1,
    ),
    # Caffe2 is gone from torch, and with it went TorchScript export, which shares the package.
    ("export/__init__.py", "from .api import *\n", "", 1),
    # The one compiled operation that is not reached through detectron2._C and so not by the stub.
    (
        "layers/nms.py",
        "    return torch.ops.detectron2.nms_rotated(",
        "    from detectron2 import _C\n\n    return _C.nms_rotated(",
        1,
    ),
)
# A stand-in for the default build backend. pip asks the backend for a package's metadata even when
# it only downloads it; the sdist's own answer needs torch and is refused by recent versions of pip.
_BACKEND = f'''
import os
class __legacy__:
    def get_requires_for_build_wheel(config_settings=None):
        return []
    def prepare_metadata_for_build_wheel(directory, config_settings=None):
        name = "{SDIST_NAME.replace("-", "_")}-{SDIST_VERSION}.dist-info"
        os.makedirs(os.path.join(directory, name))
        with open(os.path.join(directory, name, "METADATA"), "w") as f:
            f.write("Metadata-Version: 2.1\\nName: {SDIST_NAME}\\nVersion: {SDIST_VERSION}\\n")
        return name
'''


class InstallError(RuntimeError):
    """One line that says what went wrong."""


def last_error(text):
    """The line of pip's or git's output that says what went wrong: its last one with "error"."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [x for x in lines if x.lower().startswith(("error", "fatal"))]
    return (errors or lines or ["no output"])[-1]


def download_sdist(workdir):
    """Downloads the sdist into `workdir` with pip, whatever index or mirror pip is set up for."""
    backend = Path(workdir, "backend", "setuptools")
    backend.mkdir(parents=True)
    backend.joinpath("__init__.py").touch()
    backend.joinpath("build_meta.py").write_text(_BACKEND, "utf-8")
    requirement = Path(workdir, "requirement.txt")
    requirement.write_text(f"{SDIST_NAME}=={SDIST_VERSION} --hash=sha256:{SDIST_SHA256}\n", "utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation"]
    command += ["--no-binary", SDIST_NAME, "--dest", str(workdir), "-r", str(requirement)]
    # Older versions of pip know the option that the variable stands for, newer ones need none.
    env = {**os.environ, "PYTHONPATH": str(backend.parent), "PIP_USE_PEP517": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    found = sorted(Path(workdir).glob("*.tar.gz"))
    if done.returncode or not found:
        raise InstallError(
            f"pip could not download {SDIST_NAME}=={SDIST_VERSION}: "
            f"{last_error(done.stderr or done.stdout)}"
        )
    return found[0]


def verify_sha256(path, expected=SDIST_SHA256):
    """Raises InstallError unless the file's SHA-256 is `expected`."""
    actual = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if actual != expected:
        raise InstallError(
            f"{Path(path).name} is not the file it should be: sha256 {actual}, expected {expected};"
            " delete it from the mirror or pip's cache and try again"
        )


def unpack(archive, dest):
    """Unpacks the sdist under `dest`, refusing unsafe members; returns its single top folder."""
    # Pythons before 3.10.12 and 3.11.4, Debian 12's for one, have no filters.
    options = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                plain = member.isfile() or member.isdir()
                if not plain or path.is_absolute() or ".." in path.parts:
                    raise tarfile.TarError(f"{member.name} is a link or outside")
            tar.extractall(dest, **options)
    except tarfile.TarError as err:
        raise InstallError(f"{Path(archive).name} cannot be unpacked safely: {err}") from err
    tops = [p for p in Path(dest).iterdir() if p.is_dir()]
    if len(tops) != 1 or not (tops[0] / "detectron2").is_dir():
        raise InstallError(f"{Path(archive).name} holds no detectron2 folder")
    return tops[0]


def patch_tree(tree, patches=PATCHES):
    """Brings the unpacked `tree` up to current libraries and puts the stub of `_C` in place."""
    package = Path(tree, "detectron2")
    for name, old, new, count in patches:
        path = package / name
        text = path.read_text("utf-8") if path.is_file() else ""
        found = text.count(old)
        if found != count:
            raise InstallError(
                f"detectron2/{name}: expected {count} x {old.strip()!r}, found {found};"
                " this is not the tree the patches were written for"
            )
        text = text.replace(old, new)
        path.write_text(text if text.startswith(NOTICE) else NOTICE + text, "utf-8")
    target = package / "_C.py"
    if target.exists():
        raise InstallError("detectron2/_C.py is already there; is this tree patched already?")
    target.write_bytes(STUB.read_bytes())


def _wheel_files(tree):
    """Yields (name in the wheel, path) of every Python file and config."""
    roots = [("detectron2", Path(tree, "detectron2"))]
    roots += [(f"detectron2/projects/{k}", Path(tree, "projects", v)) for k, v in PROJECTS.items()]
    for prefix, root in roots:
        if not root.is_dir():
            raise InstallError(f"{root.relative_to(tree)} is missing from the unpacked sdist")
        for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".yaml")):
            yield f"{prefix}/{path.relative_to(root).as_posix()}", path


def build_wheel(tree, dest):
    """Writes the wheel of the patched `tree` into the folder `dest`; returns its path.

    A pure-Python wheel is a zip file with three small extra files. Writing it here needs no build
    tool and runs none of the sdist's own code.
    """
    info = f"detectron2-{WHEEL_VERSION}.dist-info"
    metadata = ["Metadata-Version: 2.1", "Name: detectron2", f"Version: {WHEEL_VERSION}"]
    metadata += ["Summary: Detectron2 v0.6 without its compiled extension", "License: Apache-2.0"]
    metadata += [f"Requires-Dist: {x}" for x in REQUIRES]
    files = {name: path.read_bytes() for name, path in _wheel_files(tree)}
    files[f"{info}/LICENSE"] = Path(tree, "LICENSE").read_bytes()
    files[f"{info}/METADATA"] = "\n".join([*metadata, ""]).encode()
    files[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: wsbcn_d2\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    record = []
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record.append(f"{name},sha256={digest},{len(data)}\n")
    files[f"{info}/RECORD"] = "".join([*record, f"{info}/RECORD,,\n"]).encode()
    wheel = Path(dest, f"detectron2-{WHEEL_VERSION}-py3-none-any.whl")
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return wheel


def make_wheel(workdir):
    """Downloads, verifies, unpacks, patches and packs; returns the path of the wheel."""
    sdist = download_sdist(workdir)
    verify_sha256(sdist)
    tree = unpack(sdist, Path(workdir, "tree"))
    patch_tree(tree)
    return build_wheel(tree, workdir)
