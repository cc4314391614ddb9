"""CIFAR's binary version: read as its page describes it; what is not of its form is refused."""

import tarfile

import numpy as np
import pytest
from archives import pack
from detectron2.data import DatasetCatalog, MetadataCatalog

from wsbcn_d2.data import ClassificationDataError
from wsbcn_d2.data.classification import cifar_binary, load_cifar, register_cifar

FOLDER = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}
ARCHIVE = {"cifar10": "cifar-10-binary.tar.gz", "cifar100": "cifar-100-binary.tar.gz"}
FILES = {
    "cifar10": [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"],
    "cifar100": ["train.bin", "test.bin"],
}


def row(dataset, label, pixels):
    """A row byte by byte: the label, in CIFAR-100 behind a coarse one, then red, green, blue."""
    head = bytes([label]) if dataset == "cifar10" else bytes([99, label])
    return head + b"".join(
        bytes(int(pixels[y, x, colour]) for y in range(32) for x in range(32))
        for colour in range(3)
    )


def a_set(dataset, per_file=2):
    """Name of a file to its bytes; labels and images of all files."""
    rng = np.random.default_rng(0)
    files, labels, images = {}, [], []
    for name in FILES[dataset]:
        own = rng.integers(10 if dataset == "cifar10" else 100, size=per_file).tolist()
        pixels = rng.integers(256, size=(per_file, 32, 32, 3), dtype=np.uint8)
        files[name] = b"".join(row(dataset, *each) for each in zip(own, pixels, strict=True))
        labels.append(own)
        images.append(pixels)
    return files, labels, images


def write(root, dataset, files, as_archive):
    if as_archive:
        pack(root / ARCHIVE[dataset], FOLDER[dataset], files)
        return
    (root / FOLDER[dataset]).mkdir()
    for name, content in files.items():
        (root / FOLDER[dataset] / name).write_bytes(content)


@pytest.mark.parametrize("dataset", FOLDER)
@pytest.mark.parametrize("as_archive", [True, False])
def test_it_is_read(dataset, as_archive, tmp_path):
    files, labels, images = a_set(dataset)
    write(tmp_path, dataset, files, as_archive)
    before = sorted(tmp_path.rglob("*"))
    for split, part in (("train", slice(None, -1)), ("test", slice(-1, None))):
        records = load_cifar(tmp_path, dataset, split)
        assert [r["label"] for r in records] == sum(labels[part], [])
        pixels = np.stack([r["pixels"] for r in records])
        assert pixels.dtype == np.uint8 and np.array_equal(pixels, np.concatenate(images[part]))
        assert [r["image_id"] for r in records] == list(range(len(records)))
        assert all(type(r["label"]) is int and r["height"] == r["width"] == 32 for r in records)
    assert sorted(tmp_path.rglob("*")) == before  # nothing is extracted


def test_a_folder_comes_before_its_archive_and_the_python_version_before_both(tmp_path):
    files, labels, _ = a_set("cifar10")
    write(tmp_path, "cifar10", files, as_archive=False)
    (tmp_path / ARCHIVE["cifar10"]).write_bytes(b"not looked at")
    register_cifar("test_binary", tmp_path, "cifar10", "test")
    try:
        root = MetadataCatalog.get("test_binary").image_root
        assert root == str(tmp_path / FOLDER["cifar10"])
        assert [r["label"] for r in DatasetCatalog.get("test_binary")] == labels[-1]
    finally:
        DatasetCatalog.remove("test_binary")
        MetadataCatalog.remove("test_binary")
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(ClassificationDataError, match="batches-py is damaged"):
        load_cifar(tmp_path, "cifar10", "test")


@pytest.mark.parametrize("as_archive", [True, False])
@pytest.mark.parametrize(
    "name, content, message",
    [
        ("data_batch_3.bin", b"", "data_batch_3.bin has no whole rows of 3073 bytes"),
        ("data_batch_2.bin", bytes(3072), "data_batch_2.bin has no whole rows"),
        ("data_batch_5.bin", bytes(3074), "data_batch_5.bin has no whole rows"),
        ("data_batch_1.bin", bytes([10]) + bytes(3072), "data_batch_1.bin has a label 10"),
        ("data_batch_4.bin", None, "data_batch_4.bin"),
    ],
)
def test_what_is_not_of_its_form_is_one_line(as_archive, name, content, message, tmp_path):
    files, _, _ = a_set("cifar10")
    files[name] = content
    if content is None:
        del files[name]
    write(tmp_path, "cifar10", files, as_archive)
    with pytest.raises(ClassificationDataError) as error:
        load_cifar(tmp_path, "cifar10", "train")
    text = str(error.value)
    assert "is damaged (" in text and message in text and "the binary version" in text
    assert "\n" not in text
    assert len(load_cifar(tmp_path, "cifar10", "test")) == 2


def test_the_last_label_counts_in_cifar100(tmp_path):
    files, _, _ = a_set("cifar100")
    files["train.bin"] = bytes([200, 99]) + bytes(3072)  # the coarse one is not looked at
    write(tmp_path, "cifar100", files, as_archive=False)
    assert [r["label"] for r in load_cifar(tmp_path, "cifar100", "train")] == [99]
    (tmp_path / FOLDER["cifar100"] / "train.bin").write_bytes(bytes([0, 100]) + bytes(3072))
    with pytest.raises(ClassificationDataError, match=r"train.bin has a label 100"):
        load_cifar(tmp_path, "cifar100", "train")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
def test_members_that_are_no_files_are_refused(kind, tmp_path):
    (tmp_path / "secret").write_bytes(bytes(3073))
    files = dict.fromkeys(FILES["cifar10"], b"")
    link = str(tmp_path / "secret")
    pack(tmp_path / ARCHIVE["cifar10"], FOLDER["cifar10"], files, type=kind, linkname=link)
    with pytest.raises(ClassificationDataError, match="is damaged"):
        load_cifar(tmp_path, "cifar10", "train")


def test_members_that_are_too_large_are_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar_binary, "_MOST", 2)
    files, _, _ = a_set("cifar10")
    files["data_batch_1.bin"] = bytes(3 * 3074)
    write(tmp_path, "cifar10", files, as_archive=True)
    monkeypatch.setattr(tarfile.ExFileObject, "read", lambda *_: pytest.fail("read"))
    with pytest.raises(ClassificationDataError, match=r"data_batch_1.bin is no file of images"):
        load_cifar(tmp_path, "cifar10", "train")


def cut(content):
    return content[:20000]


def scratched(content):
    return content[:9000] + bytes(b ^ 255 for b in content[9000:9100]) + content[9100:]


@pytest.mark.parametrize("damage", [cut, scratched, lambda _: b"", lambda _: b"<html>"])
def test_a_damaged_archive_is_one_line(damage, tmp_path):
    files, _, _ = a_set("cifar10")
    write(tmp_path, "cifar10", files, as_archive=True)
    path = tmp_path / ARCHIVE["cifar10"]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ClassificationDataError, match=rf"{path.name} is damaged \(") as error:
        load_cifar(tmp_path, "cifar10", "train")
    assert "\n" not in str(error.value)
