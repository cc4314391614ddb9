"""CIFAR's binary version, which torchvision does not read: rows of labels and pixels.

Format: https://www.cs.toronto.edu/~kriz/cifar.html. There is nothing in it that could be run, so
that any file of its form is read, not the original's alone.
"""

import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["BINARY", "BinaryCIFAR"]

_PIXELS = 3 * 32 * 32
_MOST = 50_000  # rows of a file: all images of a split


@dataclass(frozen=True)
class BinaryCIFAR:
    """Where the files of one of the sets lie, and what a row of them is.

    Attributes:
        base_folder, filename: the extracted folder, and the archive of it.
        train, test: names of the files of a split.
        labels: label bytes at the beginning of a row, of which the last one counts.
        classes: how many there are.
    """

    base_folder: str
    filename: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: int
    classes: int

    def read(self, place: Path, split: str) -> tuple[np.ndarray, list[int]]:
        """Images, uint8 (N, 32, 32, 3) RGB, and labels of a split.

        Args:
            place: the folder, or the archive, of which nothing is extracted.
            split: ``"train"`` or ``"test"``.

        Raises:
            OSError: if a file is missing, or cannot be read.
            ValueError: if a file is not of this form.
        """
        names = self.train if split == "train" else self.test
        images, labels = [], []
        for name, content in _contents(place, self.base_folder, names):
            rows = np.frombuffer(content, np.uint8)
            if not rows.size or rows.size % (self.labels + _PIXELS):
                raise ValueError(f"{name} has no whole rows of {self.labels + _PIXELS} bytes")
            rows = rows.reshape(-1, self.labels + _PIXELS)
            found = rows[:, self.labels - 1]
            if found.max() >= self.classes:
                raise ValueError(f"{name} has a label {found.max()}")
            images.append(rows[:, self.labels :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            labels += found.tolist()
        return np.concatenate(images), labels


def _contents(place: Path, folder: str, names: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    if place.is_dir():
        for name in names:
            yield name, (place / name).read_bytes()
        return
    try:
        with tarfile.open(place) as archive:
            for name in names:
                member = archive.getmember(f"{folder}/{name}")
                file = archive.extractfile(member)
                if file is None or member.size > _MOST * (_PIXELS + 2):
                    raise ValueError(f"{name} is no file of images")
                yield name, file.read()
            while archive.fileobj.read(2**20):  # the checksum stands at the end
                pass
    except (KeyError, EOFError, zlib.error, tarfile.TarError) as error:
        raise OSError(" ".join(str(error).split())) from error  # some say more than a line


BINARY = {
    "cifar10": BinaryCIFAR(
        base_folder="cifar-10-batches-bin",
        filename="cifar-10-binary.tar.gz",
        train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test=("test_batch.bin",),
        labels=1,
        classes=10,
    ),
    "cifar100": BinaryCIFAR(
        base_folder="cifar-100-binary",
        filename="cifar-100-binary.tar.gz",
        train=("train.bin",),
        test=("test.bin",),
        labels=2,  # the coarse one, and the fine one
        classes=100,
    ),
}
