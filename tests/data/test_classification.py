"""Classification data sets: what is read, and what is refused in one line."""

import pickle
import tarfile
import urllib.request
from hashlib import md5

import numpy as np
import pytest
import torch
from archives import pack
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from wsbcn_d2 import data, get_cfg
from wsbcn_d2.data import ClassificationDataError, ClassificationMapper
from wsbcn_d2.data.classification import (
    classification_mapper,
    classification_test_loader,
    load_cifar,
    load_image_folder,
    register_cifar,
    register_classification,
    register_image_folder,
    sources,
)
from wsbcn_d2.data.classification.augmentation import CenterCrop, PadAndCrop, RandomResizedCrop
from wsbcn_d2.data.shapes import object_crops


@pytest.fixture
def write_cifar(monkeypatch):
    """Writes a small CIFAR that passes for the original; gives (labels, images, place)."""

    def write(root, dataset, as_archive, per_file=2):
        kind, key = sources._CIFAR[dataset], "labels" if dataset == "cifar10" else "fine_labels"
        rng = np.random.default_rng(0)
        labels, images, files = [], [], {}
        for name in [name for name, _ in kind.train_list + kind.test_list]:
            own = rng.integers(10, size=per_file).tolist()
            pixels = rng.integers(256, size=(per_file, 3, 32, 32), dtype=np.uint8)
            files[name] = pickle.dumps({"data": pixels.reshape(per_file, -1), key: own})
            if name not in dict(kind.test_list):
                labels += own
                images.append(pixels.transpose(0, 2, 3, 1))
        names = {kind.meta["key"]: [str(i) for i in range(10)]}
        files[kind.meta["filename"]] = pickle.dumps(names)
        for part in ("train_list", "test_list"):
            sums = [[name, md5(files[name]).hexdigest()] for name, _ in getattr(kind, part)]
            monkeypatch.setattr(kind, part, sums)
        meta = {**kind.meta, "md5": md5(files[kind.meta["filename"]]).hexdigest()}
        monkeypatch.setattr(kind, "meta", meta)
        if as_archive:
            place = root / kind.filename
            pack(place, kind.base_folder, files)
            monkeypatch.setattr(kind, "tgz_md5", md5(place.read_bytes()).hexdigest())
        else:
            place = root / kind.base_folder
            place.mkdir()
            for name, content in files.items():
                (place / name).write_bytes(content)
        return labels, np.concatenate(images), place

    return write


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("downloads"))


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
@pytest.mark.parametrize("as_archive", [True, False])
def test_cifar_is_read(dataset, as_archive, tmp_path, write_cifar):
    labels, images, _ = write_cifar(tmp_path, dataset, as_archive)
    records = load_cifar(tmp_path, dataset, "train")
    assert [r["label"] for r in records] == labels
    assert [r["image_id"] for r in records] == list(range(len(labels)))
    assert np.array_equal(np.stack([r["pixels"] for r in records]), images)
    assert len(load_cifar(tmp_path, dataset, "test")) == 2
    assert {(r["height"], r["width"]) for r in records} == {(32, 32)}


def test_absent_cifar_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(ClassificationDataError) as error:
        load_cifar(tmp_path, "cifar10", "train")
    message = str(error.value)
    assert str(tmp_path / "cifar-10-batches-py") in message
    assert "cifar-10-python.tar.gz" in message and "DETECTRON2_DATASETS" in message
    assert "cifar-10-batches-bin and cifar-10-binary.tar.gz" in message
    assert "\n" not in message


def test_a_pickle_that_is_not_cifars_is_not_opened(tmp_path, write_cifar):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    _, _, place = write_cifar(tmp_path, "cifar10", as_archive=False)
    (place / "data_batch_1").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(
        ClassificationDataError, match="damaged.*get the python or the binary version"
    ):
        load_cifar(tmp_path, "cifar10", "train")


@pytest.mark.parametrize("content", [b"", b"\0" * 3072, None])
def test_damaged_cifar(content, tmp_path, write_cifar):
    _, _, place = write_cifar(tmp_path, "cifar10", as_archive=False)
    if content is None:
        (place / "data_batch_3").unlink()
    else:
        (place / "data_batch_3").write_bytes(content)
    with pytest.raises(
        ClassificationDataError, match="damaged.*get the python or the binary version"
    ):
        load_cifar(tmp_path, "cifar10", "train")


@pytest.mark.parametrize("damage", ["truncated", "no_tar", "missing_file"])
def test_damaged_archive(damage, tmp_path, write_cifar):
    _, _, path = write_cifar(tmp_path, "cifar10", as_archive=True)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:20000])
    elif damage == "no_tar":
        path.write_bytes(b"<html>")
    else:
        tarfile.open(path, "w:gz").close()
    with pytest.raises(ClassificationDataError, match="damaged"):
        load_cifar(tmp_path, "cifar10", "train")
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def folder(tmp_path):
    """Two classes, three images."""
    root = tmp_path / "imagenet" / "train"
    for name, size in (("n02/b.JPEG", (50, 40)), ("n01/z.png", (40, 60)), ("n01/a.jpg", (40, 40))):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (250, 10, 20)).save(root / name)
    (root / "n01" / "notes.txt").write_text("not an image")
    return root


def test_image_folder_is_listed_in_order(folder):
    records = load_image_folder(folder)
    expected = [("n01/a.jpg", 0), ("n01/z.png", 0), ("n02/b.JPEG", 1)]
    assert [(r["file_name"], r["label"]) for r in records] == [
        (str(folder / name), label) for name, label in expected
    ]
    assert [r["image_id"] for r in records] == [0, 1, 2]


def test_image_folder_refusals(folder, tmp_path):
    with pytest.raises(ClassificationDataError) as error:
        load_image_folder(tmp_path / "nowhere", "imagenet_train")
    assert str(tmp_path / "nowhere") in str(error.value) and "imagenet_train" in str(error.value)
    assert "DETECTRON2_DATASETS" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ClassificationDataError, match="any class folder"):
        load_image_folder(folder / "n01")
    (folder / "n03").mkdir()
    with pytest.raises(ClassificationDataError, match="n03"):
        load_image_folder(folder)


def test_registered_names(tmp_path):
    names = ["imagenet_train", "imagenet_val", "shapes_cls_train", "shapes_cls_val"]
    names += [f"{d}_{s}" for d in ("cifar10", "cifar100") for s in ("train", "test")]
    assert set(names) <= set(DatasetCatalog.list())
    assert {MetadataCatalog.get(n).evaluator_type for n in names} == {"classification"}
    place = MetadataCatalog.get("imagenet_train").image_root
    register_classification()  # as at a second import: names that are taken are left alone
    assert MetadataCatalog.get("imagenet_train").image_root == place
    try:
        register_classification(tmp_path)
        moved = MetadataCatalog.get("imagenet_train").image_root
        assert moved == str(tmp_path / "imagenet" / "train")
    finally:
        register_classification(data.default_root())


def test_registration_points_to_the_data(tmp_path, folder, write_cifar):
    write_cifar(tmp_path, "cifar10", as_archive=True)
    register_cifar("test_cifar", tmp_path, "cifar10", "test")
    register_image_folder("test_folder", folder)
    try:
        assert len(DatasetCatalog.get("test_cifar")) == 2
        assert MetadataCatalog.get("test_cifar").image_root.endswith("cifar-10-python.tar.gz")
        assert len(DatasetCatalog.get("test_folder")) == 3
    finally:
        for name in ("test_cifar", "test_folder"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_object_crops():
    box = {"bbox": [10, 20, 20, 40], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 3}
    corner = {"bbox": [80, 90, 100, 100], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1}
    crowd = {**box, "iscrowd": 1}
    record = {"file_name": "a.png", "height": 100, "width": 100, "image_id": 7}
    crops = object_crops([{**record, "annotations": [box, crowd, corner]}], margin=1.5)
    # Around (20, 40), half of 40 * 1.5 to each side; around (90, 95), half of 20 * 1.5.
    assert [c["crop_box"] for c in crops] == [(0, 10, 51, 71), (75, 80, 100, 100)]
    assert [(c["label"], c["image_id"]) for c in crops] == [(3, 0), (1, 1)]
    # By default 1.3 times as long: half of 40 * 1.3, half of 20 * 1.3.
    crops = object_crops([{**record, "annotations": [box, corner]}])
    assert [c["crop_box"] for c in crops] == [(0, 14, 47, 67), (77, 82, 100, 100)]


def test_shapes_view_shows_every_object_once(tiny_shapes, tiny_crops):
    shapes = DatasetCatalog.get(tiny_shapes["val"])
    crops = DatasetCatalog.get(tiny_crops["val"])
    objects = [(r["file_name"], a["category_id"]) for r in shapes for a in r["annotations"]]
    assert [(c["file_name"], c["label"]) for c in crops] == objects
    assert MetadataCatalog.get(tiny_crops["val"]).thing_classes == list(data.CLASSES)


# Augmentation.


def apply(augmentation, image):
    return augmentation.get_transform(image).apply_image(image)


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (9, 200), (200, 9)])
def test_random_resized_crop(size):
    image = np.random.default_rng(0).integers(256, size=(*size, 3), dtype=np.uint8)
    crop = RandomResizedCrop(24, scale=(0.3, 0.6))
    shares, ratios = [], []
    for _ in range(60):
        transforms = crop.get_transform(image).transforms
        cut = transforms[0]
        assert cut.x0 >= 0 and cut.x0 + cut.w <= size[1]
        assert cut.y0 >= 0 and cut.y0 + cut.h <= size[0]
        shares.append(cut.w * cut.h / image[..., 0].size)
        ratios.append(cut.w / cut.h)
        assert apply(crop, image).shape == (24, 24, 3)
    if min(size) > 9:
        assert 0.27 < min(shares) < 0.4 and 0.5 < max(shares) < 0.63
        assert 0.7 < min(ratios) < 0.9 and 1.1 < max(ratios) < 1.4
    else:  # the middle of a strip
        assert min(ratios) > 0.7 and max(ratios) < 1.4


def test_crops_are_resized_bilinearly():
    image = np.random.default_rng(0).integers(256, size=(40, 60, 3), dtype=np.uint8)
    cut, resize = RandomResizedCrop(24).get_transform(image).transforms
    part = cut.apply_image(image)
    expected = np.asarray(Image.fromarray(part).resize((24, 24), Image.BILINEAR))
    assert np.array_equal(resize.apply_image(part), expected)


def test_aspect_ratios_are_drawn_evenly_in_their_logarithm():
    image, crop = np.zeros((600, 600)), RandomResizedCrop(8, (0.01, 0.011), (1 / 16, 16))
    cuts = [crop.get_transform(image).transforms[0] for _ in range(400)]
    logs = np.log2([cut.w / cut.h for cut in cuts])
    # An eighth of the crops for each factor of two; drawn evenly, half were wider than 8.
    counts, _ = np.histogram(logs, bins=np.arange(-4, 5))
    assert counts.sum() >= 390 and counts.min() > 25 and counts.max() < 80


def test_pad_and_crop_moves_by_up_to_the_padding():
    image = np.zeros((32, 32, 3), np.uint8)
    image[16, 16] = 255
    places = set()
    for _ in range(300):
        out = apply(PadAndCrop(32, 4), image)
        assert out.shape == (32, 32, 3)
        places.add(tuple(int(v[0]) for v in np.nonzero(out[..., 0])))
    assert {y for y, _ in places} == {x for _, x in places} == set(range(12, 21))


def test_center_crop():
    image = np.arange(6 * 9).reshape(6, 9)
    assert np.array_equal(apply(CenterCrop(4), image), image[1:5, 2:6])


# The mapper.


def test_mapper_reads_crops_and_formats(classifier_cfg, tmp_path):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[5:25, 10:40] = (200, 100, 50)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    record = {"file_name": str(tmp_path / "a.png"), "image_id": 0, "label": 2}
    cfg = classifier_cfg("INPUT.CLASSIFICATION.SIZE", 16, "INPUT.CLASSIFICATION.RESIZE_TEST", 20)
    for image_format, colour in (("RGB", (200, 100, 50)), ("BGR", (50, 100, 200))):
        cfg.INPUT.FORMAT = image_format
        mapper = ClassificationMapper(cfg, is_train=False)
        out = mapper({**record, "crop_box": (10, 5, 40, 25)})
        assert out["label"] == 2 and out["image"].shape == (3, 16, 16)
        assert out["image"].dtype == torch.uint8
        assert (out["image"] == torch.tensor(colour).view(3, 1, 1)).all()
        assert len(mapper({**record})["image"].unique()) > 1  # the whole image has a background
        given = mapper({"pixels": pixels[5:25, 10:40], "image_id": 0, "label": 2})
        assert torch.equal(given["image"], out["image"])


@pytest.mark.parametrize("crop", ["random_resized", "pad"])
def test_mapper_augments_for_training_alone(crop, classifier_cfg):
    cfg = classifier_cfg("INPUT.CLASSIFICATION.TRAIN_CROP", crop, "INPUT.CLASSIFICATION.SIZE", 32)
    cfg.INPUT.CLASSIFICATION.RESIZE_TEST = 32
    pixels = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    record = {"pixels": pixels, "image_id": 0, "label": 0}
    train, test = ClassificationMapper(cfg, True), ClassificationMapper(cfg, False)
    images = {train(record)["image"].numpy().tobytes() for _ in range(8)}
    assert len(images) > 4
    assert np.array_equal(test(record)["image"].numpy(), pixels.transpose(2, 0, 1))
    assert record.keys() == {"pixels", "image_id", "label"}  # the data set's own is untouched


def test_flip_can_be_turned_off(classifier_cfg):
    cfg = classifier_cfg("INPUT.RANDOM_FLIP", "none", "INPUT.CLASSIFICATION.TRAIN_CROP", "pad")
    cfg.INPUT.CLASSIFICATION.PADDING, cfg.INPUT.CLASSIFICATION.SIZE = 0, 32
    pixels = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    mapper = ClassificationMapper(cfg, True)
    record = {"pixels": pixels, "image_id": 0, "label": 0}
    for _ in range(8):
        assert np.array_equal(mapper(record)["image"].numpy(), pixels.transpose(2, 0, 1))


def test_the_middle_of_the_shorter_side_is_tested_on(classifier_cfg):
    """RESIZE_TEST x SIZE as they are said: of a picture that is as high, without a resize."""
    cfg = classifier_cfg("INPUT.CLASSIFICATION.SIZE", 16, "INPUT.CLASSIFICATION.RESIZE_TEST", 20)
    mapper = ClassificationMapper(cfg, is_train=False)
    for shape in ((20, 41), (41, 20)):
        pixels = np.random.default_rng(0).integers(256, size=(*shape, 3), dtype=np.uint8)
        top, left = ((side - 16) // 2 for side in shape)
        expected = pixels[top : top + 16, left : left + 16].transpose(2, 0, 1)
        for _ in range(4):  # never mirrored
            out = mapper({"pixels": pixels, "image_id": 0, "label": 0})["image"]
            assert np.array_equal(out.numpy(), expected)


def test_training_pictures_are_mirrored_half_of_the_time(classifier_cfg):
    cfg = classifier_cfg("INPUT.CLASSIFICATION.TRAIN_CROP", "pad", "INPUT.CLASSIFICATION.SIZE", 32)
    cfg.INPUT.CLASSIFICATION.PADDING = 0
    pixels = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    mapper, plain = ClassificationMapper(cfg, True), pixels.transpose(2, 0, 1)
    record = {"pixels": pixels, "image_id": 0, "label": 0}
    images = [mapper(record)["image"].numpy() for _ in range(100)]
    assert all(np.array_equal(x, plain) or np.array_equal(x, plain[:, :, ::-1]) for x in images)
    assert 30 < sum(np.array_equal(x, plain) for x in images) < 70


def test_defaults_are_the_configs():
    options = get_cfg().INPUT.CLASSIFICATION
    crop = RandomResizedCrop(24)
    assert crop.scale == options.CROP_SCALE == (0.08, 1.0) and crop.ratio == (3 / 4, 4 / 3)
    assert PadAndCrop(32).padding == options.PADDING == 4
    assert (options.SIZE, options.RESIZE_TEST, options.TRAIN_CROP) == (224, 256, "random_resized")


def test_mapper_refusals(classifier_cfg):
    with pytest.raises(ValueError, match="unknown INPUT.CLASSIFICATION.TRAIN_CROP 'none'"):
        ClassificationMapper(classifier_cfg("INPUT.CLASSIFICATION.TRAIN_CROP", "none"), True)
    for key, value, message in (
        ("RESIZE_TEST", 31, "RESIZE_TEST 31 leaves no square of .*SIZE 64"),
        ("SIZE", 0, "SIZE positive"),
        ("CROP_SCALE", (0.5, 0.2), "CROP_SCALE"),
        ("CROP_SCALE", (0.0, 1.0), "CROP_SCALE"),
        ("PADDING", -1, "PADDING -1"),
    ):
        for is_train in (True, False):
            with pytest.raises(ValueError, match=message):
                ClassificationMapper(classifier_cfg(f"INPUT.CLASSIFICATION.{key}", value), is_train)
    with pytest.raises(ValueError, match="SIZE 41 cannot be cut out of an image of 32 x 32"):
        PadAndCrop(41, 4).get_transform(np.zeros((32, 32, 3), np.uint8))
    mapper = ClassificationMapper(classifier_cfg(), False)
    with pytest.raises(ValueError, match="label 6 of image 3: set MODEL.CLASSIFIER.NUM_CLASSES"):
        mapper({"image_id": 3, "label": 6})


def test_detection_data_sets_keep_detectron2s_mapper(classifier_cfg):
    cfg = classifier_cfg()
    assert classification_mapper(cfg, ["shapes_train"], True) is None
    assert classification_test_loader(cfg, "shapes_train") is None
    assert classification_mapper(cfg, ["cifar10_test"], False) is not None


def test_the_test_loader_yields_every_image_once_in_batches(classifier_cfg, tmp_path, write_cifar):
    write_cifar(tmp_path, "cifar10", as_archive=False, per_file=70)
    register_cifar("test_cifar", tmp_path, "cifar10", "test")
    cfg = classifier_cfg("DATALOADER.NUM_WORKERS", 0, "MODEL.CLASSIFIER.NUM_CLASSES", 10)
    try:
        batches = list(classification_test_loader(cfg, "test_cifar"))
    finally:
        DatasetCatalog.remove("test_cifar")
        MetadataCatalog.remove("test_cifar")
    assert [len(batch) for batch in batches] == [32, 32, 6]
    assert [x["image_id"] for batch in batches for x in batch] == list(range(70))


def test_cifar_as_folders_of_pictures(tmp_path):
    """As the configs of ResNet-20 read it."""
    for split, count in (("train", 3), ("val", 1)):
        for label in ("airplane", "truck"):
            folder = tmp_path / "cifar10_jpg" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (i, 0, 0)).save(folder / f"{i}.jpg")
    register_classification(tmp_path)
    try:
        assert [r["label"] for r in DatasetCatalog.get("cifar10_jpg_train")] == [0] * 3 + [1] * 3
        assert [r["label"] for r in DatasetCatalog.get("cifar10_jpg_val")] == [0, 1]
        assert MetadataCatalog.get("cifar10_jpg_val").evaluator_type == "classification"
    finally:
        register_classification(data.default_root())
