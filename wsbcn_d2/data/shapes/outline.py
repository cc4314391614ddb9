"""Outlines of the "shapes" classes, as implicit functions and as polygons.

Masks come from functions evaluated at the pixel centres, so that they depend on no drawing library.
"""

import functools

import numpy as np

CLASSES: tuple[str, ...] = ("disk", "square", "triangle", "star", "cross", "ring")
"""Class names; an instance's ``category`` is an index into this tuple."""

_SQUARE = 0.84
_CROSS = 0.34
_STAR_INNER = 0.46
_RING_INNER = 0.5


def shape_distance(category: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Roughly the signed distance to a class's outline in its own unit frame.

    Args:
        category: index into `CLASSES`.
        x, y: coordinates of one shape, y downwards like image rows; the object's radius is 1.

    Returns:
        Array of the same shape: negative inside, positive outside.
    """
    name = CLASSES[category]
    ax, ay = np.abs(x), np.abs(y)
    if name == "disk":
        return np.hypot(x, y) - 1.0
    if name == "ring":
        middle, half = (1 + _RING_INNER) / 2, (1 - _RING_INNER) / 2
        return np.abs(np.hypot(x, y) - middle) - half
    if name == "square":
        return np.maximum(ax, ay) - _SQUARE
    if name == "triangle":
        return np.maximum(y, 0.5 * np.sqrt(3.0) * ax - 0.5 * y) - 0.5
    if name == "cross":
        return np.minimum(np.maximum(ax - 1, ay - _CROSS), np.maximum(ax - _CROSS, ay - 1))
    # The star: fold the plane into one tenth, where the outline is a single straight edge.
    tenth = np.pi / 5
    angle = np.abs(np.mod(np.arctan2(x, -y) + tenth, 2 * tenth) - tenth)
    radius = np.hypot(x, y)
    edge = np.array([_STAR_INNER * np.cos(tenth) - 1, _STAR_INNER * np.sin(tenth)])
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    return normal[0] * (radius * np.cos(angle) - 1) + normal[1] * radius * np.sin(angle)


@functools.cache
def _unit_outline(category: int) -> np.ndarray | None:
    """The polygon (V, 2) of a class in its unit frame, or None for the ring."""
    name = CLASSES[category]
    if name == "ring":
        return None
    if name == "square":
        points = _SQUARE * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=float)
    elif name == "cross":
        c = _CROSS
        arm = np.array([[-c, -1], [c, -1], [c, -c]])
        quarter = np.array([[0.0, 1.0], [-1.0, 0.0]])  # Row vectors: (x, y) -> (-y, x).
        points = np.concatenate([arm @ np.linalg.matrix_power(quarter, k) for k in range(4)])
    else:
        count = {"disk": 40, "triangle": 3, "star": 10}[name]
        angle = 2 * np.pi * np.arange(count) / count
        radius = np.ones(count)
        if name == "star":
            radius[1::2] = _STAR_INNER
        points = np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)
    points.setflags(write=False)
    return points


class PlacedShape:
    """An object's geometry on a window of the pixel grid, not yet at its final position."""

    def __init__(self, rng: np.random.Generator, category: int, radius: float):
        self.category, self.radius = category, radius
        # Upright, give or take half a radian, as things in photographs mostly are.
        turn, stretch = rng.uniform(-0.5, 0.5), np.exp(rng.uniform(-0.16, 0.16))
        shear = rng.uniform(-0.15, 0.15)
        cos, sin = np.cos(turn), np.sin(turn)
        rotation = np.array([[cos, -sin], [sin, cos]])
        self.matrix = rotation @ np.array([[stretch, shear], [0.0, 1 / stretch]])
        self.subpixel = rng.uniform(0, 1, size=2)
        # 1.25 covers the square's corners; five more pixels hold the contact shadow.
        self.half = np.ceil(1.25 * radius * np.linalg.norm(self.matrix, axis=1)).astype(int) + 5
        columns, rows = (
            np.arange(-half, half + 1) + 0.5 - shift
            for half, shift in zip(self.half, self.subpixel, strict=True)
        )
        inverse = np.linalg.inv(self.matrix) / radius
        self.x = inverse[0, 0] * columns[None, :] + inverse[0, 1] * rows[:, None]
        self.y = inverse[1, 0] * columns[None, :] + inverse[1, 1] * rows[:, None]
        # The matrix has determinant 1, so that this stays close to a distance in pixels.
        self.distance = shape_distance(category, self.x, self.y) * radius
        self.full_area = int((self.distance < 0).sum())

    def windows(
        self, centre: np.ndarray, height: int, width: int
    ) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Slices (rows, columns) of the image and of the window that fall on each other."""
        image, window = [], []
        for axis, size in ((1, height), (0, width)):
            first = centre[axis] - self.half[axis]
            start, stop = max(first, 0), min(first + 2 * self.half[axis] + 1, size)
            image.append(slice(start, stop))
            window.append(slice(start - first, stop - first))
        return tuple(image), tuple(window)

    def outline(self, centre: np.ndarray) -> np.ndarray | None:
        """The polygon (V, 2) in image pixels when placed at `centre`, or None for the ring."""
        unit = _unit_outline(self.category)
        if unit is None:
            return None
        return unit @ self.matrix.T * self.radius + (centre + self.subpixel)
