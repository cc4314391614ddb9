"""What a checkpoint says about itself is believed only where it can be."""

import math

import pytest

from wsbcn_d2.checkpoint import CheckpointError
from wsbcn_d2.checkpoint.metadata import DETECTRON2_BGR, DETECTRON_BGR, IMAGENET_RGB, Metadata

WHOLE = Metadata(
    format="mmdet",
    norm="BCN",
    ws_formula="unbiased",
    ws_eps=1e-5,
    pixel_mean=(1.0, 2.0, 3.0),
    pixel_std=(4.0, 5.0, 6.0),
    input_format="RGB",
    presumed=("ws_eps",),
    source="a.pth",
    source_sha256="00",
)


def test_what_is_written_is_read_back():
    written = WHOLE.as_dict()
    assert written["pixel_mean"] == [1.0, 2.0, 3.0] and written["presumed"] == ["ws_eps"]
    assert Metadata.from_dict(written) == WHOLE
    assert Metadata.from_dict({**written, "of a later version": 1}) == WHOLE
    assert Metadata.from_dict({}) == Metadata() and Metadata().presumed == ()


@pytest.mark.parametrize(
    "key, value",
    [
        *(("ws_eps", value) for value in (math.nan, math.inf, "1e-5", [1e-5])),
        *(("pixel_std", value) for value in ([], [1.0, math.nan], [1.0, "2"], 57.0)),
        *(("pixel_mean", value) for value in ([], [math.inf], "RGB")),
        *(("presumed", value) for value in ("ws_eps", [1])),
        *((key, 3) for key in ("format", "norm", "ws_formula", "input_format", "source")),
    ],
)
def test_values_of_a_wrong_kind(key, value):
    with pytest.raises(CheckpointError, match=f"^recorded {key} is .* which is none$"):
        Metadata.from_dict({**WHOLE.as_dict(), key: value})
    assert getattr(Metadata.from_dict({**WHOLE.as_dict(), key: None}), key) is None


@pytest.mark.parametrize("formula", ["biased", "unbiased", "unbiased_std", "none", "wn", "cwn"])
def test_formulas(formula):
    assert Metadata.from_dict({"ws_formula": formula}).ws_formula == formula
    with pytest.raises(CheckpointError, match="formula 'other' is unknown; known are biased, unb"):
        Metadata.from_dict({"ws_formula": "other"})
    with pytest.raises(CheckpointError, match="'wsbcn_d2' entry is list, no dict"):
        Metadata.from_dict([formula])


def test_pixels_of_the_families():
    assert IMAGENET_RGB.input_format == "RGB"
    assert IMAGENET_RGB.pixel_mean == (123.675, 116.28, 103.53)
    assert IMAGENET_RGB.pixel_std == (58.395, 57.12, 57.375)
    assert DETECTRON2_BGR.input_format == DETECTRON_BGR.input_format == "BGR"
    assert DETECTRON2_BGR.pixel_mean == IMAGENET_RGB.pixel_mean[::-1]
    assert DETECTRON_BGR.pixel_mean == (102.9801, 115.9465, 122.7717)
    assert DETECTRON2_BGR.pixel_std == DETECTRON_BGR.pixel_std == (1.0, 1.0, 1.0)
