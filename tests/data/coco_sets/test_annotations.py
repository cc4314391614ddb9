"""What is a fault of an annotation file, what is odd, and how it is said."""

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_util

from wsbcn_d2.data import DataError
from wsbcn_d2.data.checks import look_at
from wsbcn_d2.data.checks.findings import Findings, shown
from wsbcn_d2.data.checks.masks import _sum_of_runs, _unpack, check_mask

from .sets import (
    SIZES,
    a_set,
    keypoints,
    kinds,
    listed_twice,
    looked_at,
    turned_and_listed_so,
    with_an_idle_class,
    write,
)


def test_packed_run_lengths_are_read_as_pycocotools_reads_them():
    rng = np.random.default_rng(0)
    for _ in range(50):
        shape = rng.integers(1, 90, size=2)
        mask = (rng.random(shape) < rng.random()).astype(np.uint8)
        packed = mask_util.encode(np.asfortranarray(mask))["counts"].decode()
        flat = mask.T.ravel()
        edges = np.flatnonzero(np.diff(flat)) + 1
        wanted = np.diff([0, *edges, flat.size])
        if flat[0]:
            wanted = np.concatenate([[0], wanted])
        assert _unpack(packed).tolist() == wanted.tolist()


def test_a_run_length_has_eleven_letters_at_most():
    """That is 55 bits; more of them would be shifted out of 64."""
    assert _sum_of_runs("P" * 10 + "0") == 0  # "P" says that more bits come, and has none itself
    assert _sum_of_runs("P" * 11 + "0") == -1


def test_a_refusal_counts_places_and_kinds():
    found = Findings()
    for place in ("a", "b", "c"):
        found.fault("what", place, "mend")
    found.fault("of evaluation", "d", "mend it", test_only=True)
    with pytest.raises(DataError) as error:
        found.refuse("set")
    more = " (and 1 other kinds: tools/check_dataset.py lists them)"
    assert str(error.value) == "set: what (a and 2 more): mend" + more
    with pytest.raises(DataError) as error:
        found.refuse("set", test=False)
    assert str(error.value) == "set: what (a and 2 more): mend"
    del found.faults["what"]
    found.refuse("set", test=False)
    with pytest.raises(DataError, match=r"^set: of evaluation \(d\): mend it$"):
        found.refuse("set")


@pytest.mark.parametrize("length, whole", [(58, True), (59, False)])
def test_a_value_in_a_message_is_not_long(length, whole):
    text = shown("x" * length)  # and two quotes
    assert text == ("'" + "x" * length + "'" if whole else "'" + "x" * 56 + "...")


@pytest.mark.parametrize("place, side", [(0, "width"), (1, "height")])
def test_a_box_outside_its_picture(place, side):
    """Its corner lies beyond the last pixel, or all of it before the first."""
    content = a_set()
    size = content["images"][0][side]
    for start, length, outside in (
        *((size - 1, 5, False), (size, 5, True), (-9, 9, False), (-9.5, 9, True)),
    ):
        box = [5, 5, 20, 20]
        box[place], box[place + 2] = start, length
        content["annotations"][0]["bbox"] = box
        faults = [fault.what for fault in looked_at(content).serious()]
        assert faults == ["box outside its picture"] * outside


@pytest.mark.parametrize("side", ["width", "height"])
@pytest.mark.parametrize("value, whole", [(1, True), (0, False), (-3, False), (7.0, False)])
def test_sides_are_positive_and_whole(side, value, whole):
    content = a_set()
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] > 1]
    content["images"][0][side] = value
    faults = [fault.what for fault in looked_at(content).serious()]
    assert faults == ["image without height and width"] * (not whole)


def test_every_note_of_a_set(tmp_path):
    """What is odd is said once a kind, and is no fault."""
    content = a_set()
    with_an_idle_class(content, None)
    listed_twice(content, None)
    content["annotations"][-1]["category_id"] = 2
    entry = write(tmp_path / "data", content)
    folder = tmp_path / "data" / "set"
    turned_and_listed_so(content, folder)
    frames = [Image.new("RGB", SIZES[1], (90 * i, 0, 0)) for i in range(3)]
    frames[0].save(folder / "1.png", "GIF", save_all=True, append_images=frames[1:])
    colour = cv2.imencode(".png", np.zeros((*SIZES[2][::-1], 3), np.uint16))[1]
    (folder / "2.png").write_bytes(colour.tobytes())
    assert look_at(entry["JSON"], entry["IMAGES"]).notes == [
        "1 pictures are listed more than once, first '0.png'",
        "1 classes have no object, first 'round'",
        "2 pictures: turned by EXIF, and listed with the size that is seen then",
        "1 pictures: of several frames, of which the first is used",
        "1 pictures: colour of 16 bits, of which the upper 8 are used",
    ]


@pytest.mark.parametrize("place, side", [(0, "width"), (1, "height")])
def test_a_box_may_reach_over_the_edge_by_a_pixel(place, side):
    for over, notes in ((1, []), (2, ["1 boxes reach over the picture's edge and are cut there"])):
        content = a_set()
        box = content["annotations"][0]["bbox"]
        box[place], box[place + 2] = 40, content["images"][0][side] - 40 + over
        assert looked_at(content).notes == notes


@pytest.mark.parametrize("beyond, faults", [(2, 0), (3, 1)])
def test_corners_are_told_by_more_than_a_fifth_of_the_boxes(beyond, faults):
    """Ten boxes that all could be corners; those that reach beyond could be nothing else."""
    content = a_set()
    one = content["annotations"][0]
    boxes = [[40, 10, 60, 20] if i < beyond else [5, 5, 20, 20] for i in range(10)]
    content["annotations"] = [{**one, "id": i, "bbox": box} for i, box in enumerate(boxes, 1)]
    found = looked_at(content)
    assert [fault.what for fault in found.serious()] == ["boxes that look like corners"] * faults
    assert len(found.notes) == 1 + 1 - faults  # of the class without objects, and the edge


@pytest.mark.parametrize("place, side", [(2, "width"), (3, "height")])
def test_a_corner_may_lie_a_pixel_beyond_the_edge(place, side):
    """One that lies farther out is no corner, and then none is."""
    for over, faults in ((1, 1), (2, 0)):
        content = a_set()
        one, image = content["annotations"][0], content["images"][0]
        boxes = [[40, 40, image["width"], image["height"]] for _ in range(4)]
        boxes[0][place] += over
        content["annotations"] = [{**one, "id": i, "bbox": box} for i, box in enumerate(boxes, 1)]
        found = [fault.what for fault in looked_at(content).serious()]
        assert found == ["boxes that look like corners"] * faults


def test_a_fault_is_said_once_and_not_what_follows_of_it():
    """Annotations of a picture that is no picture, a set that so has no object."""
    content = a_set()
    del content["images"][0]["file_name"]
    assert kinds(content) == ["image without a file_name"]
    content["annotations"] = []
    assert kinds(content) == ["image without a file_name"]
    content = a_set()
    content["annotations"] = []
    assert kinds(content) == ["no object in the whole set"]


@pytest.mark.parametrize("names", ["nose", [1, 2], {"a": "b"}])
def test_keypoints_of_a_category_are_names(names):
    content = a_set()
    content["categories"][1]["keypoints"] = names
    found = looked_at(content)
    (fault,) = found.serious()
    assert (fault.what, fault.where, fault.mend) == (
        "keypoints of a category that are no names",
        "category 2",
        "list the keypoints' names",
    )


def test_facts_of_keypoints_and_classes():
    content = a_set()
    keypoints(3)(content, None)
    for annotation in content["annotations"][:2]:
        annotation["keypoints"] = [9, 9, 2] * 2
    content["annotations"][5]["keypoints"] = []
    content["categories"].reverse()
    facts = looked_at(content).facts
    assert (facts["keypoints"], facts["points"], facts["keypoint_names"]) == (5, [2, 3], [])
    assert facts["categories"] == [[1, "round"], [2, "long"]]
    assert facts["per_class"] == {"1": 3, "2": 3} and list(facts["per_class"]) == ["1", "2"]
    assert (facts["images"], facts["with_objects"], facts["first_polygons"]) == (3, 3, 1)


@pytest.mark.parametrize("key", ["area", "iscrowd"])
@pytest.mark.parametrize("value", [None, "0", True, float("inf"), []])
def test_numbers_of_an_annotation_that_are_none(key, value):
    content = a_set()
    content["annotations"][0][key] = value
    found = looked_at(content)
    whats = [fault.what for fault in found.serious()]
    assert f"annotation without {key!r}" in whats
    assert f"annotation without {key!r}" not in [f.what for f in found.serious(test=False)]
    content = a_set()
    content["annotations"][0]["bbox"][2] = value
    assert kinds(content) == ["bbox that is not four finite numbers"]


@pytest.mark.parametrize(
    "boxes, faults",
    [
        ([[0, 0, 1, 1]], 0),  # one alone may be a small object
        ([[0, 0, 1, 1], [0.5, 0, 0.5, 1]], 1),
        ([[0, 0, 1, 1], [0.5, 0, 0.5, 1.5]], 0),
    ],
)
def test_shares_are_told_by_all_of_several_boxes(boxes, faults):
    content = a_set()
    one = content["annotations"][0]
    content["annotations"] = [{**one, "id": i, "bbox": box} for i, box in enumerate(boxes, 1)]
    assert kinds(content) == ["boxes that look like shares of the picture"] * faults


@pytest.mark.parametrize(
    "mask, kind, faults",
    [
        ([[1, 1, 9, 1, 9, 9]], "polygons", 0),
        ([[1, 1, 9, 1, 9.5, float("nan")]], "polygons", 1),
        ([[1, 1, 9, 1, 9, True]], "polygons", 1),
        (([], {}, None), "unmasked", 0),
        (((), "", 3), "unmasked", 1),
    ],
)
def test_kinds_of_masks(mask, kind, faults):
    for each in mask if isinstance(mask, tuple) else (mask,):
        found = Findings()
        assert check_mask(each, {"height": 9, "width": 9}, "here", found) == kind
        assert len(found.faults) == faults, each


@pytest.mark.parametrize(
    "counts, pixels",
    [
        *(([3, 4], 7), ([], 0), ([0, 7], 7), ([-1, 8], -1), ([3.0, 4], -1), ([True, 6], -1)),
        *((None, -1), ("", -1), ("P", -1), ("1p", -1), (b"07", -1), ("07", 7)),
    ],
)
def test_pixels_that_run_lengths_cover(counts, pixels):
    assert _sum_of_runs(counts) == pixels


def test_a_file_that_is_not_there(tmp_path):
    (fault,) = look_at(str(tmp_path / "no.json"), str(tmp_path)).serious()
    where = f"{tmp_path / 'no.json'}: No such file or directory"
    assert str(fault) == f"no annotation file ({where}): check the path"
