"""Pictures of more than 8 bits: what ``INPUT.PICTURE_RANGE`` states becomes 0..255.

Detectron2 reads every picture by Pillow, which cuts such pictures at 255. It opens files through
its ``PathManager``; a name with the prefix below is opened here, and is an 8-bit picture then.
"""

import io
from collections.abc import Callable, Sequence

import numpy as np
from detectron2.data.detection_utils import read_image
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler
from PIL import Image, ImageOps

from .errors import DataError

__all__ = ["RangeMapper", "check_range", "is_deep", "read_picture"]

_PREFIX = "wsbcn-range://"


def is_deep(picture: Image.Image) -> bool:
    """Whether a picture's one channel has more than 8 bits."""
    return picture.mode in ("I", "F") or picture.mode.startswith("I;16")


def check_range(limits: Sequence[float]) -> None:
    """Refuse what is neither empty nor two rising numbers."""
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in limits)
    if limits and not (numbers and len(limits) == 2 and limits[0] < limits[1]):
        raise DataError(
            f"INPUT.PICTURE_RANGE {list(limits)}: say the values that become black and white, such "
            "as [0, 4095], or [] for pictures of 8 bits"
        )


def read_picture(path: str, image_format: str, limits: Sequence[float] = ()) -> np.ndarray:
    """Detectron2's ``read_image``, that scales pictures of more than 8 bits rather than cut them.

    Args:
        path: of the picture.
        image_format: ``INPUT.FORMAT``.
        limits: ``INPUT.PICTURE_RANGE``.

    Returns:
        uint8 array (H, W, C).

    Raises:
        DataError: such a picture without a range.
    """
    if limits:
        return read_image(_ranged(path, limits), image_format)
    with PathManager.open(path, "rb") as stream, Image.open(stream) as picture:
        if is_deep(picture):
            raise DataError(
                f"{path} has more than 8 bits ({picture.mode}): set INPUT.PICTURE_RANGE to the "
                "values that become black and white, such as [0, 4095]"
            )
    return read_image(path, image_format)


class RangeMapper:
    """A mapper whose pictures are read with a range."""

    def __init__(self, mapper: Callable[[dict], dict], limits: Sequence[float]):
        """
        Args:
            mapper: Detectron2's ``DatasetMapper``, or another that reads ``file_name`` as it does.
            limits: values that become 0 and 255.
        """
        check_range(limits)
        self.mapper = mapper
        self.limits = tuple(limits)

    def __call__(self, record: dict) -> dict:
        name = record["file_name"]
        mapped = self.mapper({**record, "file_name": _ranged(name, self.limits)})
        return {**mapped, "file_name": name}


def _ranged(path: str, limits: Sequence[float]) -> str:
    low, high = map(float, limits)
    return f"{_PREFIX}{low!r}:{high!r}/{path}"


class _RangeHandler(PathHandler):
    """Opens ``wsbcn-range://LOW:HIGH/PATH`` as the picture PATH in 8 bits."""

    def _get_supported_prefixes(self) -> list[str]:
        return [_PREFIX]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs) -> io.BytesIO:
        limits, _, name = path.removeprefix(_PREFIX).partition("/")
        low, high = map(float, limits.split(":"))
        with PathManager.open(name, "rb") as stream:
            content = io.BytesIO(stream.read())
        with Image.open(content) as picture:
            if not is_deep(picture):
                content.seek(0)
                return content
            # Turned here, since the bitmap that is handed on says nothing of its orientation.
            values = np.asarray(ImageOps.exif_transpose(picture), dtype=np.float64)
        scaled = np.clip((values - low) / (high - low), 0, 1) * 255
        result = io.BytesIO()
        Image.fromarray(np.rint(scaled).astype(np.uint8)).save(result, "BMP")
        result.seek(0)
        return result


PathManager.register_handler(_RangeHandler())
