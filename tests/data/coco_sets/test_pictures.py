"""Pictures of more than 8 bits, turned by EXIF, too large, elsewhere."""

from types import SimpleNamespace

import numpy as np
import pytest
from detectron2.data.detection_utils import read_image
from PIL import Image

from wsbcn_d2.data import DataError, RangeMapper, read_picture
from wsbcn_d2.data.checks import look_at, pictures
from wsbcn_d2.data.picture_range import is_deep

from .sets import EXIF_ORIENTATION, SIZES, a_set, write


def test_the_first_of_several_deep_pictures_is_named(tmp_path):
    content = a_set()
    entry = write(tmp_path, content)
    for i, (width, height) in enumerate(SIZES):
        deep = np.full((height, width), 100 * (i + 3), np.uint16)
        deep[0, 0] = i
        Image.fromarray(deep).save(tmp_path / "set" / f"{i}.png")
    facts = look_at(entry["JSON"], entry["IMAGES"]).facts
    assert (facts["deep"], facts["first_deep"], facts["deep_range"]) == (
        *(3, ["0.png", "I;16"]),
        [0, 300],
    )


@pytest.mark.parametrize("image_format, channels", [("RGB", 3), ("BGR", 3), ("L", 1)])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_range_is_scaled(image_format, channels, suffix, tmp_path):
    values = np.array([[0, 100, 1100], [2100, 4000, 65535]], np.uint16)
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(values).save(path)
    out = read_picture(str(path), image_format, [100, 2100])
    assert out.dtype == np.uint8 and out.shape == (2, 3, channels)
    expected = np.array([[0, 0, 128], [255, 255, 255]])
    assert all(np.array_equal(out[..., c], expected) for c in range(channels))
    with pytest.raises(DataError, match="has more than 8 bits .*set INPUT.PICTURE_RANGE"):
        read_picture(str(path), image_format)


@pytest.mark.parametrize("limits", [[9, 0], [9], [1, 1], ["a", "b"], [True, 2]])
def test_a_mapper_with_a_range_that_is_none_is_refused(limits):
    with pytest.raises(DataError, match="say the values that become black and white"):
        RangeMapper(lambda record: record, limits)


def test_a_mapper_with_a_range_gives_its_records_their_names_back(tmp_path):
    values = np.array([[0, 2048], [4095, 9999]], np.uint16)
    path = str(tmp_path / "a.png")
    Image.fromarray(values).save(path)

    def mapper(record):
        return {**record, "image": read_image(record["file_name"], "L")}

    record = {"file_name": path, "image_id": 3}
    out = RangeMapper(mapper, [0, 4095])(record)
    assert (out["file_name"], out["image_id"]) == (path, 3) and record["file_name"] == path
    assert out["image"][..., 0].tolist() == [[0, 128], [255, 255]]


def test_pictures_of_8_bits_are_left_alone_by_a_range(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(9, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for limits in ([], [0, 4095]):
        assert np.array_equal(read_picture(str(tmp_path / "a.png"), "RGB", limits), pixels)


def test_a_deep_picture_is_turned_as_others_are(tmp_path):
    for dtype, name in ((np.uint8, "8.png"), (np.uint16, "16.png")):
        image = Image.fromarray(np.arange(6, dtype=dtype).reshape(2, 3) * 51)
        exif = image.getexif()
        exif[EXIF_ORIENTATION] = 6
        image.save(tmp_path / name, exif=exif)
    plain = read_picture(str(tmp_path / "8.png"), "L")
    assert plain.shape == (3, 2, 1)
    assert np.array_equal(read_picture(str(tmp_path / "16.png"), "L", [0, 255]), plain)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("listed", ["as stored", "as seen"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_every_way_that_exif_turns_a_picture(orientation, listed, kind, tmp_path):
    """One that is mirrored or upside down is refused; on its side, if it is not listed so."""
    stored = (72, 64)
    if kind == "TIFF":
        Image.new("RGB", stored).save(
            tmp_path / "a", "TIFF", tiffinfo={EXIF_ORIENTATION: orientation}
        )
    else:
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        Image.new("RGB", stored).save(tmp_path / "a", kind, exif=exif)
    sideways = orientation >= 5
    width, height = stored[::-1] if listed == "as seen" and sideways else stored
    entry = {"file_name": "a", "width": width, "height": height}
    fault, notes, deep = pictures._look(str(tmp_path / "a"), entry, False)
    assert deep == ""
    if orientation == 1:
        assert fault is None and notes == []
    elif sideways and listed == "as seen" and kind != "TIFF":
        assert fault is None
        assert notes == ["turned by EXIF, and listed with the size that is seen then"]
    else:
        assert fault[0] == "EXIF turns the picture, which Detectron2 obeys"
        assert fault[1] == f"a, orientation {orientation}" and notes == []


def test_pictures_that_are_too_large_or_elsewhere(tmp_path, monkeypatch):
    entry = {"file_name": "0.png", "width": 64, "height": 72}
    write(tmp_path, a_set())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    fault, _, _ = pictures._look(str(tmp_path / "set" / "0.png"), entry, True)
    assert fault == ("picture of too many pixels", "0.png", "cut it into tiles")
    url = {**entry, "file_name": "http://x/0.png"}
    fault, _, _ = pictures._look(str(tmp_path / "set" / "http://x/0.png"), url, True)
    mend = "download it: file_name is a path in the picture folder"
    assert fault == ("picture that is missing", "http://x/0.png", mend)
    fault, _, _ = pictures._look(
        str(tmp_path / "set" / "a" / "0.png"), {**entry, "file_name": "a/0.png"}, True
    )
    folder = tmp_path / "set" / "a"
    assert fault[2] == f"put it into {folder}, or give the folder that file_name starts from"


@pytest.mark.parametrize(
    "mode, deep",
    [
        *((mode, True) for mode in ("I", "F", "I;16", "I;16B", "I;16L")),
        *((mode, False) for mode in ("1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr")),
    ],
)
def test_modes_of_more_than_8_bits(mode, deep):
    assert is_deep(SimpleNamespace(mode=mode)) is deep
