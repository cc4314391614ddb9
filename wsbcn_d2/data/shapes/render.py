"""Draws the scenes of the "shapes" data set: pure functions of a random generator.

The statistics follow natural images where normalization layers are sensitive to them. Surfaces
carry noise whose amplitude falls as 1/f, colour channels are correlated, light varies smoothly
over the scene, objects occlude each other and are cut by the frame. Colours are drawn without
looking at the class: only the outline names it, and most of the time a typical pattern hints at it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .outline import CLASSES, PlacedShape
from .surface import background, object_surface

# What must be left of every object: the share of its whole area that occlusion and frame leave
# together, the share inside the frame when it is placed, and pixels.
MIN_VISIBLE = 0.45
MIN_IN_FRAME = 0.65
MIN_PIXELS = 48
MIN_DIAMETER = 10.0

_PLACEMENT_TRIES = 12


@dataclass(eq=False)
class Instance:
    """One drawn object.

    Attributes:
        category: index into `CLASSES`.
        mask: bool array (H, W), the visible pixels.
        outline: float array (V, 2) of x, y in pixels (pixel centres at .5) around the whole
            object, or None where one polygon cannot describe it (the ring).
        full_area: number of pixels the object would have if nothing hid it, outside the frame
            included.
    """

    category: int
    mask: np.ndarray
    outline: np.ndarray | None
    full_area: int

    @property
    def visible_fraction(self) -> float:
        """Visible pixels over `full_area`, in 0..1."""
        return float(self.mask.sum()) / self.full_area


def _place(
    rng: np.random.Generator, placed: PlacedShape, instances: list[Instance], size: tuple[int, int]
) -> np.ndarray | None:
    """An integer centre (x, y) that leaves every object visible enough, or None."""
    extent = np.array([size[1], size[0]])
    for attempt in range(_PLACEMENT_TRIES):
        centre = np.floor(rng.uniform(0.1, 0.9, size=2) * extent).astype(int)
        if not instances and attempt == _PLACEMENT_TRIES - 1:
            return extent // 2  # A scene has at least one object.
        image, window = placed.windows(centre, *size)
        inside = placed.distance[window] < 0
        if inside.sum() < max(MIN_IN_FRAME * placed.full_area, MIN_PIXELS):
            continue
        hidden_pixels = [int((old.mask[image] & inside).sum()) for old in instances]
        if all(
            old.mask.sum() - hidden >= max(MIN_VISIBLE * old.full_area, MIN_PIXELS)
            for old, hidden in zip(instances, hidden_pixels, strict=True)
        ):
            return centre
    return None


def _paint(
    rng: np.random.Generator,
    canvas: np.ndarray,
    placed: PlacedShape,
    centre: np.ndarray,
    colours: list[np.ndarray],
    light: np.ndarray,
) -> np.ndarray:
    """Paints an object over `canvas` (H, W, 3) in place; returns its mask (H, W)."""
    image, window = placed.windows(centre, *canvas.shape[:2])
    x, y, distance = placed.x[window], placed.y[window], placed.distance[window]
    surface, colour = object_surface(
        rng, placed.category, x * placed.radius, y * placed.radius, colours
    )
    colours.append(colour)
    # Brighter towards the light, as on a bulging surface.
    surface *= (1 + 0.22 * (x * light[0] + y * light[1]))[..., None]
    alpha = np.clip(0.5 - distance / rng.uniform(1.0, 1.8), 0, 1)[..., None]
    shadow = 1 - rng.uniform(0.1, 0.4) * np.clip(1 - distance / 4.0, 0, 1)
    ground = canvas[image] * shadow[..., None]
    canvas[image] = ground + alpha * (surface - ground)
    mask = np.zeros(canvas.shape[:2], dtype=bool)
    mask[image] = distance < 0
    return mask


def render_scene(
    rng: np.random.Generator,
    size: tuple[int, int],
    *,
    num_objects: tuple[int, int] = (1, 5),
    scale: tuple[float, float] = (0.25, 0.6),
    categories: Sequence[int] | None = None,
) -> tuple[np.ndarray, list[Instance]]:
    """Draws one scene.

    Args:
        rng: the only source of randomness: equal states give equal scenes.
        size: (H, W) in pixels, at least 32 each.
        num_objects: smallest and largest number of objects; an object for which no place is found
            is left out, but the first always stays.
        scale: smallest and largest diameter of an object over the shorter side of the image; never
            below `MIN_DIAMETER` pixels.
        categories: classes to draw from, indices into `CLASSES`; all of them by default.

    Returns:
        The image, uint8 (H, W, 3) RGB, and the instances from back to front.

    Raises:
        ValueError: for sizes, counts, scales or categories outside their range.
    """
    height, width = size
    choice = list(range(len(CLASSES)) if categories is None else categories)
    if min(size) < 32:
        raise ValueError(f"size must be at least (32, 32), got {tuple(size)}")
    if not 1 <= num_objects[0] <= num_objects[1]:
        raise ValueError(f"num_objects must be 1 <= smallest <= largest, got {num_objects}")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale must be 0 < smallest <= largest <= 1, got {scale}")
    if not choice or any(c not in range(len(CLASSES)) for c in choice):
        raise ValueError(f"categories must be indices into {CLASSES}, got {categories}")
    canvas, colours = background(rng, height, width)
    direction = rng.uniform(0, 2 * np.pi)
    light = np.array([np.cos(direction), np.sin(direction)])
    instances: list[Instance] = []
    for _ in range(int(rng.integers(num_objects[0], num_objects[1] + 1))):
        category = choice[int(rng.integers(len(choice)))]
        diameter = max(np.exp(rng.uniform(*np.log(scale))) * min(size), MIN_DIAMETER)
        placed = PlacedShape(rng, category, diameter / 2)
        centre = _place(rng, placed, instances, size)
        if centre is None:
            continue
        mask = _paint(rng, canvas, placed, centre, colours, light)
        for old in instances:
            old.mask &= ~mask
        instances.append(Instance(category, mask, placed.outline(centre), placed.full_area))
    rows = np.linspace(-1, 1, height)[:, None]
    columns = np.linspace(-1, 1, width)[None, :]
    slope = rng.uniform(0.0, 0.35)
    canvas *= np.exp(slope * (columns * light[0] + rows * light[1]))[..., None]
    canvas += rng.standard_normal(canvas.shape) * 0.012
    return np.clip(np.rint(canvas * 255), 0, 255).astype(np.uint8), instances
