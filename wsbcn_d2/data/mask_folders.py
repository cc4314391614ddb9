"""Sets of one mask file per object (2018 Data Science Bowl and its kind) into COCO format."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask

from ..files import locked, progress
from .errors import DataError

__all__ = ["prepare_mask_folders"]

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
_LARGEST_FILE = 2**28  # bytes; what a zip says of a member's size is believed up to here
_PLAIN = re.compile(r"[\w .()+,=@-]+")


def prepare_mask_folders(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    category: str = "nucleus",
    val_share: float = 0.2,
    val_names: Collection[str] | None = None,
) -> dict[str, dict[str, int]]:
    """Write ``annotations/{train,val}.json`` and the pictures of ``train/`` and ``val/``.

    The source has a folder per picture, wherever below the top: ``NAME/images/*.png``, exactly one
    file, and ``NAME/masks/*.png``, one per object: where a mask is not zero (black, in colours)
    the object is. Pictures keep their bytes and are called NAME. Which of them are for validation
    depends on the names alone. An empty mask is no object.

    Args:
        source: folder or zip, which is read in place.
        target: folder to make; there whole or not at all.
        category: name of the only category.
        val_share: share of validation pictures, in (0, 1).
        val_names: names of the validation pictures instead.

    Returns:
        Of each split: the numbers of ``images``, ``objects``, and ``empty`` masks left out.

    Raises:
        DataError: naming the file that cannot be used, or if ``target`` is there.
    """
    target = Path(target)
    with _opened(Path(source)) as files:
        pictures = _pictures(files.names, source)
        val = _validation(sorted(pictures), val_share, val_names)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.parent / f".{target.name}.part"
        with locked(f"{part}.lock", patience=0):
            if target.exists():
                raise DataError(f"{target} is there already: remove it, or give another name")
            shutil.rmtree(part, ignore_errors=True)  # of a killed process
            try:
                counts = _write(files, pictures, val, part, category)
                part.rename(target)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return counts


class _Files:
    """Names of files below a folder or in a zip, relative and with slashes, and their bytes."""

    def __init__(self, root: Path, archive: zipfile.ZipFile | None = None):
        self.root, self.archive = root, archive
        if archive is None:
            found = (p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
        else:
            found = (info.filename for info in archive.infolist() if not info.is_dir())
        self.names = sorted(found)
        if twice := [a for a, b in itertools.pairwise(self.names) if a == b]:
            raise DataError(f"{root}: {twice[0]} is in it twice; pack it again")

    def read(self, name: str) -> bytes:
        if self.archive and self.archive.getinfo(name).file_size > _LARGEST_FILE:
            raise DataError(f"{self.root}: {name} is larger than {_LARGEST_FILE >> 20} MB")
        try:
            if self.archive:
                return self.archive.read(name)
            return (self.root / name).read_bytes()
        # RuntimeError: encrypted, or packed by an unknown method.
        except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
            raise DataError(f"{self.root}: {name} cannot be read: {error}") from error

    def image(self, name: str) -> Image.Image:
        """Decoded, and turned as its EXIF data say: as Detectron2 reads it."""
        content = io.BytesIO(self.read(name))
        try:
            return ImageOps.exif_transpose(Image.open(content))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{self.root}: {name} is no image: {error}") from error


@contextlib.contextmanager
def _opened(source: Path) -> Iterator[_Files]:
    if source.is_dir():
        yield _Files(source)
        return
    try:
        archive = zipfile.ZipFile(source)
    except FileNotFoundError as error:
        raise DataError(f"{source} not found: give the set's folder or zip") from error
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{source} is neither a folder nor a zip: {error}") from error
    with archive:
        yield _Files(source, archive)


def _pictures(names: list[str], source) -> dict[str, tuple[str, list[str]]]:
    """Name of each picture to its file and those of its masks."""
    found: dict[str, dict[str, list[str]]] = {}
    places: dict[str, str] = {}
    for name in names:
        path = PurePosixPath(name)
        hidden = path.name.startswith(".") or path.parts[0] == "__MACOSX"
        if len(path.parts) < 3 or hidden or path.suffix.lower() not in _SUFFIXES:
            continue
        *_, picture, kind, _file = path.parts
        if kind not in ("images", "masks"):
            continue
        # It becomes a file's name here: nothing of a zip's may lead out of the folder.
        if not _PLAIN.fullmatch(picture) or not picture.strip("."):
            raise DataError(f"{source}: {picture!r} cannot name a picture")
        if places.setdefault(picture, str(path.parents[1])) != str(path.parents[1]):
            raise DataError(f"{source}: two folders are called {picture}")
        found.setdefault(picture, {"images": [], "masks": []})[kind].append(name)
    for picture, kinds in found.items():
        if (count := len(kinds["images"])) != 1:
            raise DataError(f"{source}: {picture}/images has {count} pictures, expected one")
    if not any(kinds["masks"] for kinds in found.values()):
        raise DataError(
            f"{source}: no NAME/images and NAME/masks with {', '.join(_SUFFIXES)} files in it"
        )
    return {picture: (kinds["images"][0], kinds["masks"]) for picture, kinds in found.items()}


def _validation(names: list[str], share: float, given: Collection[str] | None) -> set[str]:
    if given is not None:
        val = set(given)
        if absent := sorted(val - set(names)):
            raise DataError(f"{len(absent)} validation pictures are not there, as {absent[0]}")
    else:
        if not 0 < share < 1:
            raise DataError(f"the share of validation pictures must be in (0, 1), got {share}")
        # By a hash of the name: the same whatever else is in the set's folder, and no series of
        # pictures with like names goes to one side.
        order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
        val = set(order[: round(share * len(names))])
    if not 0 < len(val) < len(names):
        raise DataError(f"{len(val)} of {len(names)} pictures for validation: both sides need one")
    return val


def _write(files: _Files, pictures: dict, val: set[str], folder: Path, category: str) -> dict:
    for part in ("annotations", "train", "val"):
        (folder / part).mkdir(parents=True)
    content = {
        split: {
            "info": {"description": f"{category}, {split}, from one mask file per object"},
            "licenses": [],
            "categories": [{"id": 1, "name": category}],
            "images": [],
            "annotations": [],
        }
        for split in ("train", "val")
    }
    empty, ids = dict.fromkeys(content, 0), itertools.count(1)
    for number, name in enumerate(progress(sorted(pictures), desc="pictures", unit="img"), 1):
        file, masks = pictures[name]
        split = "val" if name in val else "train"
        width, height = files.image(file).size
        target = f"{name}{PurePosixPath(file).suffix.lower()}"
        (folder / split / target).write_bytes(files.read(file))
        content[split]["images"].append(
            {"id": number, "file_name": target, "height": height, "width": width}
        )
        for mask in masks:
            pixels = _object(files.image(mask))
            if pixels.shape != (height, width):
                size = f"{pixels.shape[1]} x {pixels.shape[0]}"
                raise DataError(f"{files.root}: {mask} is {size}, its picture {width} x {height}")
            if pixels.any():
                found = {"id": next(ids), "image_id": number, **_annotation(pixels)}
                content[split]["annotations"].append(found)
            else:
                empty[split] += 1
    for split, text in content.items():
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(text))
    return {
        split: {"images": len(c["images"]), "objects": len(c["annotations"]), "empty": empty[split]}
        for split, c in content.items()
    }


def _object(image: Image.Image) -> np.ndarray:
    """Where the object is, (height, width) of bool: what is not black; alpha does not count."""
    if image.mode in ("P", "PA", "LA", "RGBA", "CMYK", "YCbCr"):
        image = image.convert("RGB")
    pixels = np.asarray(image) != 0
    return pixels.any(axis=2) if pixels.ndim == 3 else pixels


def _annotation(pixels: np.ndarray) -> dict:
    rle = coco_mask.encode(np.asfortranarray(pixels, np.uint8))
    return {
        "category_id": 1,
        "iscrowd": 0,
        "area": int(coco_mask.area(rle)),
        "bbox": coco_mask.toBbox(rle).tolist(),
        "segmentation": {"size": list(pixels.shape), "counts": rle["counts"].decode("ascii")},
    }
