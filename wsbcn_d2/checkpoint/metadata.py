"""What a checkpoint says about itself: the ``wsbcn_d2`` entry beside ``model``."""

import math
from dataclasses import asdict, dataclass, fields

from ..layers import WS_FORMULAS
from .errors import CheckpointError

METADATA_KEY = "wsbcn_d2"
FORMULAS = (*WS_FORMULAS, "none")
OTHER_KINDS = ("wn", "cwn")  # MODEL.WS.KIND, recorded in place of a formula


@dataclass(frozen=True)
class Pixels:
    """How images were fed to a network.

    Attributes:
        input_format: "RGB" or "BGR".
        pixel_mean, pixel_std: three numbers each in that channel order, images in 0..255.
    """

    input_format: str
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]


# Each family keeps its own numbers: under WS the standard deviation cannot be folded into the stem.
IMAGENET_RGB = Pixels("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
DETECTRON2_BGR = Pixels("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0))
DETECTRON_BGR = Pixels("BGR", (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0))


def _is_number(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def _is_valid(key, value):
    """Whether a field that is not None has a value of its kind."""
    if key == "ws_eps":
        return _is_number(value)
    if key == "presumed":
        return isinstance(value, tuple) and all(isinstance(name, str) for name in value)
    if key in ("pixel_mean", "pixel_std"):
        return isinstance(value, tuple) and bool(value) and all(map(_is_number, value))
    return isinstance(value, str)


@dataclass(frozen=True)
class Metadata:
    """A checkpoint's conventions; None where they are not known.

    Attributes:
        format: name of the source format.
        norm: "GN", "BCN" or "BN" (kind of the backbone's norms).
        ws_formula: one of ``FORMULAS``; "none" for weights trained without WS; "wn" and "cwn" for
            those with another reparametrization.
        ws_eps: epsilon of the formula.
        pixel_mean, pixel_std: three floats each, in the order of ``input_format``.
        input_format: "RGB" or "BGR".
        presumed: names of the fields that follow from the format, not from the file itself.
        source: file name or URL of the original.
        source_sha256: hexadecimal digest of the original.
    """

    format: str | None = None
    norm: str | None = None
    ws_formula: str | None = None
    ws_eps: float | None = None
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    input_format: str | None = None
    presumed: tuple[str, ...] = ()
    source: str | None = None
    source_sha256: str | None = None

    def as_dict(self) -> dict:
        """Returns a dict of plain types, as ``torch.load(weights_only=True)`` admits them."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, data: object) -> "Metadata":
        """Reads what `as_dict` wrote; unknown entries (a later version's) are ignored.

        Raises:
            CheckpointError: not a dict, a value of a wrong kind, or an unknown WS formula.
        """
        if not isinstance(data, dict):
            raise CheckpointError(f"the {METADATA_KEY!r} entry is {type(data).__name__}, no dict")
        known = {f.name for f in fields(cls)}
        values = {
            key: tuple(value) if isinstance(value, (list, tuple)) else value
            for key, value in data.items()
            if key in known
        }
        for key, value in values.items():
            if value is not None and not _is_valid(key, value):
                raise CheckpointError(f"recorded {key} is {str(value)[:40]!r}, which is none")
        formula = values.get("ws_formula")
        if formula is not None and formula not in FORMULAS + OTHER_KINDS:
            raise CheckpointError(
                f"recorded WS formula {formula!r} is unknown; known are {', '.join(FORMULAS)}"
            )
        return cls(**values)
