"""The embedded "shapes" set: annotations, writing once, registration."""

import contextlib
import importlib
import io
import json
import multiprocessing
import zlib
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.evaluation import COCOEvaluator
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from wsbcn_d2 import data
from wsbcn_d2.data.shapes import write as shapes

COUNT = 40
FOLDER = f"shapes_v{data.GENERATOR_VERSION}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return data.write_shapes(tmp_path_factory.mktemp("sets"), "val", COUNT, seed=3)


@pytest.fixture(scope="module")
def coco(folder) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(folder / "annotations" / "shapes_val.json")


@pytest.fixture
def catalog(monkeypatch):
    """Removes what a test registers and restores the registration it found."""
    before = set(DatasetCatalog.list())
    root = Path(MetadataCatalog.get("shapes_train").json_file).parents[2]
    yield
    monkeypatch.undo()
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    data.register_shapes(root)


def files_of(folder: Path) -> dict[str, bytes]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


# Determinism.


def test_same_seed_same_files_and_another_seed_others(tmp_path):
    first = files_of(data.write_shapes(tmp_path / "a", "val", 4, seed=5))
    again = files_of(data.write_shapes(tmp_path / "b", "val", 4, seed=5))
    other = files_of(data.write_shapes(tmp_path / "c", "val", 4, seed=6))
    assert first == again
    assert len(first) == 4 + 2
    assert all(first[name] != other[name] for name in first)


def test_an_image_depends_on_neither_count_nor_other_splits(tmp_path):
    few = files_of(data.write_shapes(tmp_path, "val", 2))
    spec = data.ShapesSpec((("train", 3), ("val", 3)))
    both = files_of(data.ensure_shapes(tmp_path, spec))
    assert few["val/000001.png"] == both["val/000001.png"]
    assert both["train/000001.png"] != both["val/000001.png"]


# The annotations.


def test_images_match_the_json_and_differ_in_size(coco, folder):
    sizes = set()
    for record in coco.loadImgs(coco.getImgIds()):
        with Image.open(folder / "val" / record["file_name"]) as image:
            assert image.mode == "RGB" and image.size == (record["width"], record["height"])
        sizes.add((record["height"], record["width"]))
        assert 1 <= len(coco.getAnnIds(record["id"])) <= 5
    assert len(coco.getImgIds()) == COUNT and len(sizes) > COUNT // 2
    assert np.min(list(sizes)) >= 112 and np.max(list(sizes)) <= 144


def test_annotations_decode_to_tight_boxes_and_areas(coco):
    annotations = coco.loadAnns(coco.getAnnIds())
    assert len({a["id"] for a in annotations}) == len(annotations)
    for annotation in annotations:
        mask = coco.annToMask(annotation)
        rows, columns = np.where(mask)
        tight = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        assert annotation["bbox"] == tight
        assert annotation["area"] == mask.sum() > 0
        assert annotation["iscrowd"] == 0
    names = {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())}
    assert tuple(names[i + 1] for i in range(len(names))) == data.CLASSES
    assert {a["category_id"] for a in annotations} == set(names)


def test_both_kinds_of_segmentation_and_what_they_decode_to(coco, folder):
    """Renders the images again: the stored masks are the visible masks drawn."""
    kinds = {list: 0, dict: 0}
    stamp = json.loads((folder / "spec.json").read_text())
    for index in range(COUNT):
        rng = np.random.default_rng([stamp["seed"], zlib.crc32(b"val"), index])
        size = tuple(rng.integers(112, 145, size=2).tolist())
        _, instances = data.render_scene(rng, size)
        annotations = coco.loadAnns(coco.getAnnIds(index + 1))
        assert len(instances) == len(annotations)
        for instance, annotation in zip(instances, annotations, strict=True):
            stored, drawn = coco.annToMask(annotation).astype(bool), instance.mask
            kind = type(annotation["segmentation"])
            kinds[kind] += 1
            if kind is dict:
                np.testing.assert_array_equal(stored, drawn)
            else:
                assert (stored & drawn).sum() >= 0.95 * (stored | drawn).sum()
                assert instance.visible_fraction == 1.0
                assert data.CLASSES[instance.category] != "ring"
    assert min(kinds.values()) > 0.2 * sum(kinds.values()), kinds


@pytest.mark.parametrize("rows, polygon", [(100, True), (96, True), (93, False), (60, False)])
def test_a_polygon_stands_for_a_mask_that_it_is_19_20ths_of(rows, polygon):
    mask = np.zeros((120, 120), bool)
    mask[10:110, 10:110] = True
    corners = [[10, 10], [110, 10], [110, 10 + rows], [10, 10 + rows]]
    segmentation, rle = shapes._segmentation(
        data.Instance(0, mask, np.array(corners, float), int(mask.sum()))
    )
    assert isinstance(segmentation, list) == polygon
    share = mask_util.area(rle) / mask.sum()
    assert share == pytest.approx(rows / 100 if polygon else 1.0, abs=0.015)
    # Of an object that is partly hidden, the outline is more than what is seen.
    hidden = data.Instance(0, mask, np.array(corners, float), int(mask.sum()) + 1)
    assert isinstance(shapes._segmentation(hidden)[0], dict)


# Writing.


@pytest.mark.parametrize(
    "arguments",
    [
        {"splits": ()},
        {"splits": (("annotations", 3),)},
        {"splits": (("a/b", 3),)},
        {"splits": (("val", 0),)},
        {"seed": -1},
        {"image_size": (16, 64)},
        {"image_size": (128, 64)},
    ],
)
def test_spec_refuses(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))[:5]):
        data.ShapesSpec(**arguments)


def test_a_failed_rendering_leaves_no_folder_and_the_next_one_succeeds(tmp_path, monkeypatch):
    drawn = []

    def fail_late(*args):
        drawn.append(None)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return data.render_scene(*args)

    monkeypatch.setattr(shapes, "render_scene", fail_late)
    with pytest.raises(KeyboardInterrupt):
        data.write_shapes(tmp_path, "val", 4)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    monkeypatch.undo()
    # What kill -9 leaves behind is a partial folder: it is swept away, never taken for a set.
    folder = tmp_path / data.ShapesSpec((("val", 4),)).folder_name
    partial = folder.with_name(folder.name + ".partial")
    (partial / "val").mkdir(parents=True)
    (partial / "val" / "999999.png").write_bytes(b"half")
    assert data.write_shapes(tmp_path, "val", 4) == folder
    assert not partial.exists() and len(list((folder / "val").iterdir())) == 4


def _render_in_child(root: Path, barrier, seen) -> None:
    real = shapes._render

    def counted(folder, spec):
        seen.put("rendered")
        real(folder, spec)

    shapes._render = counted
    barrier.wait()
    seen.put(str(data.write_shapes(root, "val", 30)))


def test_concurrent_processes_render_once(tmp_path):
    context = multiprocessing.get_context("fork")  # Spawned ones would import torch for seconds.
    barrier, seen = context.Barrier(2), context.Queue()
    children = [
        context.Process(target=_render_in_child, args=(tmp_path, barrier, seen)) for _ in range(2)
    ]
    for child in children:
        child.start()
    lines = sorted(seen.get(timeout=60) for _ in range(3))
    for child in children:
        child.join(timeout=60)
    assert [child.exitcode for child in children] == [0, 0]
    assert lines[0] == lines[1] and lines[2] == "rendered" and seen.empty()
    assert len(list((Path(lines[0]) / "val").iterdir())) == 30


def test_a_present_set_is_neither_rendered_nor_touched_again(tmp_path, monkeypatch):
    folder = data.write_shapes(tmp_path, "val", 2)
    monkeypatch.setattr(shapes, "_render", lambda *_: pytest.fail("rendered again"))
    monkeypatch.setattr(shapes, "locked", lambda *_: pytest.fail("a read-only set has no lock"))
    assert data.write_shapes(tmp_path, "val", 2) == folder


def damage_truncate_json(folder):
    path = folder / "annotations" / "shapes_val.json"
    path.write_bytes(path.read_bytes()[:-100])


def damage_truncate_image(folder):
    path = folder / "val" / "000001.png"
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    "json truncated": damage_truncate_json,
    "json missing": lambda folder: (folder / "annotations" / "shapes_val.json").unlink(),
    "image truncated": damage_truncate_image,
    "image missing": lambda folder: (folder / "val" / "000000.png").unlink(),
    "stamp missing": lambda folder: (folder / "spec.json").unlink(),
    "stamp empty": lambda folder: (folder / "spec.json").write_text("[]"),
    "stamp of another": lambda folder: (folder / "spec.json").write_text('{"contents": {}}'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_folder_is_named_with_the_mend(tmp_path, damage):
    folder = data.write_shapes(tmp_path, "val", 2)
    damage(folder)
    with pytest.raises(data.ShapesDataError) as caught:
        data.write_shapes(tmp_path, "val", 2)
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message
    assert "delete it and it will be rendered again" in message


def test_a_root_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(data.ShapesDataError, match="cannot write .*file.*DETECTRON2_DATASETS"):
        data.write_shapes(tmp_path / "file" / "sets", "val", 2)


def test_version_and_spec_choose_the_folder(monkeypatch):
    default = data.ShapesSpec()
    assert default.folder_name == f"shapes_v{data.GENERATOR_VERSION}"
    others = [data.ShapesSpec(seed=1), data.ShapesSpec((("val", 2),))]
    names = {spec.folder_name for spec in [default, *others]}
    assert len(names) == 3
    monkeypatch.setattr(shapes, "GENERATOR_VERSION", 99)
    assert default.folder_name == "shapes_v99"
    assert not names & {spec.folder_name for spec in [default, *others]}


# Registration.


def test_import_registers_and_writes_nothing(tmp_path, catalog, monkeypatch):
    for name in ("shapes_train", "shapes_val"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "sets"))
    monkeypatch.chdir(tmp_path)
    importlib.reload(data)
    json_file = MetadataCatalog.get("shapes_val").json_file
    assert Path(json_file) == tmp_path / "sets" / FOLDER / "annotations/shapes_val.json"
    assert "shapes_train" in DatasetCatalog.list() and list(tmp_path.iterdir()) == []


def test_default_registration_is_idempotent_and_follows_the_root(tmp_path, catalog, monkeypatch):
    data.register_shapes(tmp_path)
    metadata = MetadataCatalog.get("shapes_train")
    data.register_shapes(tmp_path)
    assert MetadataCatalog.get("shapes_train") is metadata
    assert metadata.json_file == str(tmp_path / FOLDER / "annotations/shapes_train.json")
    assert metadata.image_root == str(tmp_path / FOLDER / "train")
    assert metadata.evaluator_type == "coco" and metadata.thing_classes == list(data.CLASSES)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "elsewhere"))
    data.register_shapes()
    assert "elsewhere" in MetadataCatalog.get("shapes_train").json_file
    assert list(tmp_path.iterdir()) == []


def test_a_name_of_another_data_set_is_not_taken(catalog):
    DatasetCatalog.register("someone_elses", list)
    with pytest.raises(ValueError, match="someone_elses"):
        data.register_shapes_split("someone_elses")


def test_loader_and_evaluator_read_the_registered_split(tmp_path, catalog, caplog):
    data.register_shapes_split("tiny_shapes", tmp_path, "val", 3, seed=1, image_size=(64, 80))
    cfg = get_cfg()
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.DATALOADER.NUM_WORKERS = 0
    with caplog.at_level("INFO", logger="wsbcn_d2.data"):
        loader = build_detection_test_loader(cfg, "tiny_shapes")
        assert [r.name for r in caplog.records].count("wsbcn_d2.data") == 1
        DatasetCatalog.get("tiny_shapes")
        assert [r.name for r in caplog.records].count("wsbcn_d2.data") == 1
    inputs = [batch[0] for batch in loader]
    assert len(inputs) == 3 and inputs[0]["image"].shape[0] == 3
    evaluator = COCOEvaluator("tiny_shapes", output_dir=str(tmp_path / "out"), use_fast_impl=False)
    evaluator.reset()
    evaluator.process(inputs, perfect_predictions("tiny_shapes", inputs))
    results = evaluator.evaluate()
    assert results["bbox"]["AP"] > 99 and results["segm"]["AP"] > 99


def perfect_predictions(name: str, inputs: list[dict]) -> list[dict]:
    """The ground truth, through the mapper with bitmasks, as a model's output."""
    import torch
    from detectron2.data import DatasetMapper
    from detectron2.structures import Instances

    mapper = DatasetMapper(
        is_train=True, augmentations=[], image_format="BGR", use_instance_mask=True,
        instance_mask_format="bitmask",
    )  # fmt: skip
    records = {record["image_id"]: record for record in DatasetCatalog.get(name)}
    outputs = []
    for sample in inputs:
        truth = mapper(records[sample["image_id"]])["instances"]
        output = Instances((sample["height"], sample["width"]))
        output.pred_boxes = truth.gt_boxes
        output.pred_classes = truth.gt_classes
        output.pred_masks = truth.gt_masks.tensor
        output.scores = torch.ones(len(truth))
        outputs.append({"instances": output})
    return outputs
