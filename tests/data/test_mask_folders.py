"""Sets of one mask file per object become COCO-format sets, whole or not at all."""

import hashlib
import importlib.util
import inspect
import io
import json
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from wsbcn_d2.data import DataError, default_root, register_nuclei
from wsbcn_d2.data.mask_folders import (
    _Files,
    _object,
    _validation,
    prepare_mask_folders,
)
from wsbcn_d2.engine import UsageError, check_config, load_config
from wsbcn_d2.files import locked

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "prepare_nuclei.py"


def png(pixels, mode=None):
    buffer = io.BytesIO()
    Image.fromarray(pixels, mode).save(buffer, "PNG")
    return buffer.getvalue()


def scene(seed, size=(20, 30), objects=3):
    """A picture, and masks that do not overlap, as arrays."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, objects + 1, size)
    masks = [(labels == i + 1).astype(np.uint8) * 255 for i in range(objects)]
    return rng.integers(0, 255, (*size, 3), np.uint8), masks


def published(count=5, top="stage1_train/"):
    """Files of a set as it is published: name to bytes; and the masks by picture."""
    files, truth = {}, {}
    for seed in range(count):
        name = f"{seed:x}a{seed}"
        picture, masks = scene(seed, (20 + seed, 30))
        truth[name] = masks
        files[f"{top}{name}/images/{name}.png"] = png(picture)
        for i, mask in enumerate(masks):
            files[f"{top}{name}/masks/{i:02}.png"] = png(mask)
    return files, truth


def in_folder(files, folder):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def in_zip(files, path, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def annotations(target, split):
    return json.loads((target / "annotations" / f"{split}.json").read_text())


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def visible(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_pictures_and_masks_are_those_of_the_source(tmp_path):
    files, truth = published()
    counts = prepare_mask_folders(in_folder(files, tmp_path / "in"), tmp_path / "out")
    assert counts == {
        "train": {"images": 4, "objects": 12, "empty": 0},
        "val": {"images": 1, "objects": 3, "empty": 0},
    }
    ids, objects = [], []
    for split in ("train", "val"):
        coco = COCO(str(tmp_path / "out" / "annotations" / f"{split}.json"))
        assert coco.loadCats(1)[0]["name"] == "nucleus"
        for image in coco.dataset["images"]:
            name = Path(image["file_name"]).stem
            source = files[f"stage1_train/{name}/images/{name}.png"]
            assert (tmp_path / "out" / split / image["file_name"]).read_bytes() == source
            found = coco.loadAnns(coco.getAnnIds(image["id"]))
            for annotation, mask in zip(found, truth[name], strict=True):
                expected = coco_mask.encode(np.asfortranarray(mask > 0, np.uint8))
                assert annotation["segmentation"]["counts"].encode() == expected["counts"]
                assert np.array_equal(coco.annToMask(annotation), mask > 0)
                ys, xs = np.nonzero(mask)
                assert annotation["area"] == len(xs)
                box = [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
                assert annotation["bbox"] == box
                assert annotation["category_id"] == 1 and annotation["iscrowd"] == 0
            ids.append(image["id"])
            objects += [annotation["id"] for annotation in found]
    assert sorted(ids) == [1, 2, 3, 4, 5]
    assert sorted(objects) == list(range(1, 16))


def test_zip_and_folder_with_and_without_a_folder_around_give_the_same_bytes(tmp_path):
    made = []
    for i, top in enumerate(("", "stage1_train/", "a/b/")):
        files, _ = published(top=top)
        files |= {f"__MACOSX/{top}x/images/._x.png": b"?", f"{top}.DS_Store": b"?"}
        files |= {f"{top}0a0/masks/.hidden.png": b"?", f"{top}classes.csv": b"x"}
        sources = in_folder(files, tmp_path / f"f{i}"), in_zip(files, tmp_path / f"{i}.zip")
        for j, source in enumerate(sources):
            prepare_mask_folders(source, tmp_path / "out" / f"{i}{j}")
            made.append(contents(tmp_path / "out" / f"{i}{j}"))
    assert len(made[0]) == 2 + 5
    assert all(other == made[0] for other in made)


def names_of(target, split):
    return {Path(image["file_name"]).stem for image in annotations(target, split)["images"]}


def test_the_split_depends_on_names_alone(tmp_path):
    files, truth = published(10)
    prepare_mask_folders(in_folder(files, tmp_path / "in"), tmp_path / "one", val_share=0.3)
    val = names_of(tmp_path / "one", "val")
    assert len(val) == 3 and names_of(tmp_path / "one", "train") == truth.keys() - val
    # The first by the digests of the names, which have no order in common with the names.
    order = sorted(truth, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert val == set(order[:3]) != set(sorted(truth)[:3])
    files = {name.replace("stage1_train", "x"): files[name] for name in reversed(files)}
    prepare_mask_folders(in_zip(files, tmp_path / "in.zip"), tmp_path / "two", val_share=0.3)
    assert names_of(tmp_path / "two", "val") == val
    prepare_mask_folders(tmp_path / "in", tmp_path / "three", val_names=["0a0", "1a1"])
    assert names_of(tmp_path / "three", "val") == {"0a0", "1a1"}


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16"])
def test_masks_of_every_mode_mean_the_same(tmp_path, mode):
    files, truth = published(2)
    mask = truth["0a0"][0] > 0
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    if mode == "P":  # the background is not the first colour of the palette
        image = Image.fromarray(np.where(mask, 0, 1).astype(np.uint8), "P")
        image.putpalette([0, 0, 200, 0, 0, 0])
    elif mode == "I;16":
        image = Image.fromarray(mask.astype(np.uint16) * 300)  # its low byte is not enough
    else:
        image = grey.convert(mode)  # alpha is opaque everywhere
    image.save(buffer := io.BytesIO(), "PNG")
    files["stage1_train/0a0/masks/00.png"] = buffer.getvalue()
    prepare_mask_folders(in_folder(files, tmp_path / "in"), tmp_path / "out", val_names=["0a0"])
    found = annotations(tmp_path / "out", "val")["annotations"][0]
    assert np.array_equal(coco_mask.decode(found["segmentation"]), mask)


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "bmp", "tif", "tiff", "PNG"])
def test_formats_of_pictures(tmp_path, suffix):
    picture, masks = scene(0, objects=1)
    files = {}
    for kind, pixels in (("images", picture), ("masks", masks[0])):
        for name in "ab":
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(
                buffer, Image.registered_extensions()[f".{suffix.lower()}"]
            )
            files[f"{name}/{kind}/0.{suffix}"] = buffer.getvalue()
    source = in_folder(files, tmp_path / "source")
    prepare_mask_folders(source, tmp_path / "target", val_share=0.5)
    assert sum(len(annotations(tmp_path / "target", s)["images"]) for s in ("train", "val")) == 2


def test_an_empty_mask_is_no_object_and_a_picture_may_have_none(tmp_path):
    files, truth = published(2)
    files["stage1_train/0a0/masks/00.png"] = png(np.zeros((20, 30), np.uint8))
    files = {name: x for name, x in files.items() if "1a1/masks" not in name}
    counts = prepare_mask_folders(
        in_folder(files, tmp_path / "in"), tmp_path / "out", val_names=["1a1"]
    )
    assert counts["train"] == {"images": 1, "objects": 2, "empty": 1}
    assert counts["val"] == {"images": 1, "objects": 0, "empty": 0}


def rotated(picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(buffer := io.BytesIO(), "JPEG", exif=exif)
    return buffer.getvalue()


def test_sizes_are_those_that_detectron2_reads(tmp_path):
    files, _ = published(2)
    picture, _ = scene(0, (30, 20))  # turned, it is 20 x 30, as its masks are
    del files["stage1_train/0a0/images/0a0.png"]
    files["stage1_train/0a0/images/0a0.JPG"] = rotated(picture)
    prepare_mask_folders(in_folder(files, tmp_path / "in"), tmp_path / "out", val_names=["0a0"])
    (image,) = annotations(tmp_path / "out", "val")["images"]
    assert (image["height"], image["width"], image["file_name"]) == (20, 30, "0a0.jpg")


PICTURE, MASK = "stage1_train/0a0/images/0a0.png", "stage1_train/0a0/masks/00.png"
WRONG = {
    "no image": ({MASK: b"no picture"}, "masks/00.png is no image"),
    "truncated picture": ({PICTURE: png(scene(0)[0])[:-900]}, "0a0.png is no image"),
    "another size": ({MASK: png(np.ones((4, 5), np.uint8))}, "masks/00.png is 5 x 4"),
    "two pictures": ({PICTURE.replace("0a0.png", "x.png"): b""}, "0a0/images has 2 pictures"),
    "no picture": ({"stage1_train/q/masks/0.png": b""}, "q/images has 0 pictures"),
    "one name twice": ({PICTURE.replace("stage1", "stage2"): b""}, "two folders are called 0a0"),
}


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("case", WRONG)
def test_damage_is_named_and_nothing_is_left(tmp_path, case, kind):
    files, _ = published()
    more, message = WRONG[case]
    make = in_folder if kind == "folder" else in_zip
    source = make({**files, **more}, tmp_path / "in")
    with pytest.raises(DataError, match=message) as raised:
        prepare_mask_folders(source, tmp_path / "sets" / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "sets").exists() or visible(tmp_path / "sets") == []


@pytest.mark.parametrize("name", ["..", "a\\b", "a\nb", "a:b"])
def test_no_name_of_a_zip_leads_out_of_the_folder(tmp_path, name):
    files, _ = published(2)
    files[f"x/{name}/images/p.png"] = files[PICTURE]
    with pytest.raises(DataError, match="cannot name a picture"):
        prepare_mask_folders(in_zip(files, tmp_path / "in.zip"), tmp_path / "out")
    assert visible(tmp_path) == ["in.zip"]


def test_a_zip_that_lies_or_is_damaged(tmp_path, monkeypatch):
    files, _ = published()
    path = in_zip(files, tmp_path / "in.zip", zipfile.ZIP_STORED)
    content = path.read_bytes()
    place = content.index(files[MASK])
    path.write_bytes(content[:place] + b"\0" + content[place + 1 :])
    with pytest.raises(DataError, match=r"masks/00\.png cannot be read"):
        prepare_mask_folders(path, tmp_path / "out")
    monkeypatch.setattr("wsbcn_d2.data.mask_folders._LARGEST_FILE", 1)
    with pytest.raises(DataError, match="is larger than"):
        prepare_mask_folders(path, tmp_path / "out")
    path.write_bytes(b"PK no zip")
    with pytest.raises(DataError, match="neither a folder nor a zip"):
        prepare_mask_folders(path, tmp_path / "out")
    assert visible(tmp_path) == ["in.zip"]


def test_what_a_killed_process_left_is_taken_over_and_a_living_one_is_not_disturbed(tmp_path):
    source = in_folder(published()[0], tmp_path / "in")
    in_folder({"train/old.png": b"x", "annotations/train.json": b"{"}, tmp_path / ".out.part")
    with locked(tmp_path / ".out.part.lock"), pytest.raises(TimeoutError, match="another process"):
        prepare_mask_folders(source, tmp_path / "out")
    assert (tmp_path / ".out.part" / "train" / "old.png").is_file()
    prepare_mask_folders(source, tmp_path / "out")
    assert visible(tmp_path) == ["in", "out"]
    assert not (tmp_path / "out" / "train" / "old.png").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_with_one_file_twice(tmp_path):
    files, _ = published(2)
    with zipfile.ZipFile(in_zip(files, tmp_path / "in.zip"), "a") as archive:
        archive.writestr(MASK, files[MASK])
    with pytest.raises(DataError, match="is in it twice"):
        prepare_mask_folders(tmp_path / "in.zip", tmp_path / "out")


@pytest.mark.parametrize(
    "options,message",
    [
        ({"val_share": 0.0}, "in \\(0, 1\\), got 0"),
        ({"val_share": 0.05}, "0 of 5 pictures for validation"),
        ({"val_names": ["z", "0a0"]}, "1 validation pictures are not there, as z"),
        ({"val_names": []}, "0 of 5 pictures"),
    ],
)
def test_a_split_that_cannot_be(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        prepare_mask_folders(in_folder(published()[0], tmp_path / "in"), tmp_path / "o", **options)


def test_a_share_is_rounded_to_the_nearest():
    names = [str(i) for i in range(5)]
    assert [len(_validation(names, share, None)) for share in (0.28, 0.32, 0.72)] == [1, 2, 4]


def test_a_member_of_a_zip_may_have_256_megabytes(tmp_path, monkeypatch):
    path = in_zip(published(2)[0], tmp_path / "in.zip")
    size = SimpleNamespace(file_size=2**28)
    monkeypatch.setattr(zipfile.ZipFile, "getinfo", lambda *_: size)
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: png(scene(0)[0]))
    with zipfile.ZipFile(path) as archive:
        files = _Files(path, archive)
        assert files.read("any")
        size.file_size += 1
        with pytest.raises(DataError, match="any is larger than 256 MB"):
            files.read("any")


def load_tool():
    spec = importlib.util.spec_from_file_location("prepare_nuclei", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tool(tmp_path, monkeypatch, capsys):
    main = load_tool().main
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "sets"))
    source = str(in_zip(published()[0], tmp_path / "in.zip"))
    (tmp_path / "val.txt").write_text("0a0\n1a1\n")
    assert main([source, "--val-names", str(tmp_path / "val.txt")]) == 0
    assert "train: 3 pictures, 9 objects\nval: 2 pictures, 6 objects\n" in capsys.readouterr().out
    before = contents(tmp_path / "sets" / "nuclei")
    assert main([source]) == 2  # never written over
    assert contents(tmp_path / "sets" / "nuclei") == before
    assert main([source, "--name", "cells", "--category", "cell"]) == 0
    assert annotations(tmp_path / "sets" / "cells", "val")["categories"][0]["name"] == "cell"
    capsys.readouterr()
    for wrong in ([str(tmp_path / "absent.zip")], [source, "--val-names", "absent.txt"]):
        assert main([*wrong, "--name", "other"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and "absent" in error
    assert visible(tmp_path / "sets") == ["cells", "nuclei"]


def test_what_the_tool_asks_for(tmp_path, monkeypatch, capsys):
    tool, asked = load_tool(), []
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    counts = {"train": {"images": 4, "objects": 9, "empty": 2}}
    monkeypatch.setattr(
        tool, "prepare_mask_folders", lambda *a, **k: asked.append((a, k)) or counts
    )
    assert tool.main(["in.zip"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"written {tmp_path / 'nuclei'}",
        "train: 4 pictures, 9 objects; 2 empty masks left out",
    ]
    (tmp_path / "names").write_text(" a \n\nb\n")
    options = ["--val", "0.4", "--val-names", str(tmp_path / "names"), "--category", "cell"]
    assert tool.main(["in.zip", *options, "--name", "cells", "--root", "other"]) == 0
    assert asked == [
        (
            ("in.zip", tmp_path / "nuclei"),
            {"category": "nucleus", "val_share": 0.2, "val_names": None},
        ),
        (
            ("in.zip", Path("other/cells")),
            {"category": "cell", "val_share": 0.4, "val_names": ["a", "b"]},
        ),
    ]


@pytest.fixture
def registered(tmp_path):
    register_nuclei(tmp_path)
    yield tmp_path
    register_nuclei(default_root())


def test_what_was_prepared_is_registered(registered):
    register_nuclei()  # names that are taken are left alone
    cfg = load_config(str(ROOT / "configs" / "nuclei" / "mask_rcnn_R_18_FPN_gn_ws.yaml"))
    with pytest.raises(UsageError, match=r"absent: .*train\.json not found; get .*bbbc.*prepare_"):
        check_config(cfg)
    source = in_folder(published()[0], registered / "in")
    prepare_mask_folders(source, registered / "nuclei")
    check_config(cfg)
    records = DatasetCatalog.get("nuclei_train")
    assert MetadataCatalog.get("nuclei_train").thing_classes == ["nucleus"]
    assert len(records) == 4 and all(len(r["annotations"]) == 3 for r in records)
    assert all(Path(r["file_name"]).is_file() for r in records)
    assert {a["category_id"] for r in records for a in r["annotations"]} == {0}
    shutil.rmtree(registered / "nuclei" / "train")
    with pytest.raises(UsageError, match="train not found"):
        check_config(cfg)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "PA", "LA", "RGBA", "RGB", "L", "I", "F"])
def test_what_is_not_black_is_the_object(mode):
    """In inks black is the last one's full, in YCbCr neither channel of colour is 0."""
    colours = [(0, 0, 0), (0, 0, 60), (255, 255, 255)]
    image = Image.new("RGB", (3, 1))
    for x, colour in enumerate(colours):
        image.putpixel((x, 0), colour)
    if mode == "CMYK":
        image = Image.new("CMYK", (3, 1))
        for x, inks in enumerate(((0, 0, 0, 255), (255, 255, 0, 195), (0, 0, 0, 0))):
            image.putpixel((x, 0), inks)
    elif mode == "PA":
        image = image.convert("RGBA").convert("PA")
    elif mode in ("I", "F"):
        image = image.convert("L").convert(mode)
    else:
        image = image.convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(0)
    found = _object(image)
    assert found.dtype == bool and found.tolist() == [[False, True, True]]


def test_what_is_written_beside_the_objects(tmp_path):
    source = in_folder(published()[0], tmp_path / "in")
    prepare_mask_folders(source, tmp_path / "out", category="cell")
    for split in ("train", "val"):
        content = annotations(tmp_path / "out", split)
        text = f"cell, {split}, from one mask file per object"
        assert content["info"] == {"description": text} and content["licenses"] == []
        assert content["categories"] == [{"id": 1, "name": "cell"}]
    options = inspect.signature(prepare_mask_folders).parameters
    assert {name: p.default for name, p in options.items() if p.kind is p.KEYWORD_ONLY} == {
        **{"category": "nucleus", "val_share": 0.2, "val_names": None}
    }


def test_names_that_are_no_pictures_of_a_set(tmp_path):
    files, _ = published(2)
    files |= {"images/x.png": b"?", "stage1_train/0a0/other/x.png": b"?", "a/images/x.gif": b"?"}
    counts = prepare_mask_folders(in_folder(files, tmp_path / "in"), tmp_path / "o", val_share=0.5)
    assert [counts[split]["images"] for split in ("train", "val")] == [1, 1]
    with pytest.raises(DataError, match=r"no NAME/images and NAME/masks with \.png, \.jpg, "):
        prepare_mask_folders(in_folder({"a/images/x.png": b""}, tmp_path / "no"), tmp_path / "p")
    with pytest.raises(DataError, match=r"absent\.zip not found: give the set's folder or zip"):
        prepare_mask_folders(tmp_path / "absent.zip", tmp_path / "p")
    (tmp_path / "there").mkdir()
    with pytest.raises(DataError, match="there is there already: remove it, or give another name"):
        prepare_mask_folders(tmp_path / "in", tmp_path / "there", val_share=0.5)
