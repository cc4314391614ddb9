"""Surfaces of the "shapes" scenes: 1/f noise, patterns and colours."""

import functools
from collections.abc import Sequence

import numpy as np

PATTERNS: tuple[str, ...] = ("dots", "checks", "stripes", "marble", "clouds", "waves")
"""Surface patterns; ``PATTERNS[i]`` is the typical one of ``CLASSES[i]``."""

EXPONENTS = (1.0, 1.1, 1.2)
"""Exponents of the surfaces' spectra, by amplitude; photographs lie around 1."""

TYPICAL_PATTERN_RATE = 0.9


@functools.lru_cache(maxsize=256)
def _amplitudes(rows: int, cols: int, exponent: float) -> np.ndarray:
    """1 / f**exponent for each rfft2 coefficient, (rows, cols // 2 + 1), and 0 at f = 0."""
    radial = np.hypot(np.fft.fftfreq(rows)[:, None], np.fft.rfftfreq(cols)[None, :])
    radial[0, 0] = np.inf
    amplitude = radial**-exponent
    amplitude[0, 0] = 0.0
    amplitude.setflags(write=False)
    return amplitude


def power_law_noise(
    rng: np.random.Generator, count: int, height: int, width: int, exponent: float = 1.0
) -> np.ndarray:
    """Noise fields whose spectral amplitude falls as 1 / f**exponent.

    The exponent is 1 for natural images, 0 for white noise.

    Returns:
        float64 array (count, height, width); each field has mean 0 and standard deviation 1.
    """
    # Multiples of 8 keep the transform fast, and cropping hides its periodicity.
    rows, cols = (height + 15) // 8 * 8, (width + 15) // 8 * 8
    spectrum = rng.standard_normal((count, rows, cols // 2 + 1, 2)).view(np.complex128)[..., 0]
    spectrum *= _amplitudes(rows, cols, exponent)
    fields = np.fft.irfft2(spectrum, s=(rows, cols))[:, :height, :width]
    fields -= fields.mean(axis=(1, 2), keepdims=True)
    fields /= fields.std(axis=(1, 2), keepdims=True)
    return fields


def _pattern(
    rng: np.random.Generator, name: str, u: np.ndarray, v: np.ndarray, warp: np.ndarray
) -> np.ndarray:
    """A pattern in about -1..1 over object coordinates u, v in pixels, bent by noise `warp`."""
    if name == "clouds":
        return np.tanh(1.5 * warp)
    # In pixels rather than object radii: a small object shows fewer periods, not finer ones.
    wave = 2 * np.pi / rng.uniform(5.0, 9.0)
    phase = rng.uniform(0, 2 * np.pi, size=2)
    bend = 0.35 * warp
    if name == "waves":
        value = np.sin(wave * np.hypot(u, v) + phase[0] + bend)
    elif name == "marble":
        value = np.sin(0.6 * wave * u + phase[0] + 2.5 * warp)
    elif name == "stripes":
        value = np.sin(wave * u + phase[0] + bend)
    else:
        a, b = np.sin(0.8 * wave * u + phase[0] + bend), np.sin(0.8 * wave * v + phase[1] + bend)
        value = a * b * 1.5 if name == "checks" else a + b - 0.7
    return np.tanh(2.0 * value)


def _coloured(rng: np.random.Generator, noise: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Colours a surface: (3, H, W) noise around the colour `base` (3,) -> (H, W, 3)."""
    contrast = rng.uniform(0.08, 0.13)
    tints = rng.standard_normal((2, 3)) * 0.03
    # One shared luminance field and two weak tints: channels correlate as in photographs.
    # Spelled out, as a matrix product would round differently from one BLAS to the next.
    weak = noise[1][..., None] * tints[0] + noise[2][..., None] * tints[1]
    return base + contrast * noise[0][..., None] + weak


def pick_colour(rng: np.random.Generator, others: Sequence[np.ndarray]) -> np.ndarray:
    """A random colour (3,), as far as a few tries get it from the `others` around it."""
    candidates = rng.uniform(0.15, 0.85, size=(6, 1)) + rng.uniform(-0.16, 0.16, size=(6, 3))
    if not others:
        return candidates[0]
    gaps = [min(np.linalg.norm(colour - other) for other in others) for colour in candidates]
    far = [i for i, gap in enumerate(gaps) if gap > 0.4]
    return candidates[far[0] if far else int(np.argmax(gaps))]


def background(
    rng: np.random.Generator, height: int, width: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Draws a 1/f background, half of the time of two regions.

    Returns:
        float64 array (height, width, 3), about 0..1, and its one or two mean colours (3,).
    """
    exponent = EXPONENTS[int(rng.integers(len(EXPONENTS)))]
    bases = [pick_colour(rng, [])]
    image = _coloured(rng, power_law_noise(rng, 3, height, width, exponent), bases[0])
    if rng.random() < 0.5:
        # A curved border between two grounds: an edge alone must not give an object away.
        field = power_law_noise(rng, 1, height, width, 2.0)[0]
        share = 0.5 + 0.5 * np.tanh(12.0 * (field - rng.uniform(-0.8, 0.8)))
        shift = np.clip(rng.standard_normal(3), -1.5, 1.5) * 0.1
        bases.append(bases[0] + shift)
        image += share[..., None] * shift
    return image, bases


def object_surface(
    rng: np.random.Generator, category: int, u: np.ndarray, v: np.ndarray, others: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Draws an object's surface: a pattern and 1/f noise around a colour blind to the class.

    Args:
        rng: source of randomness.
        category: its typical pattern is chosen more often than the others.
        u, v: object coordinates in pixels, (H, W) each.
        others: mean colours (3,) around it to keep away from.

    Returns:
        float64 array (H, W, 3), about 0..1, and its mean colour (3,).
    """
    typical = rng.random() < TYPICAL_PATTERN_RATE
    name = PATTERNS[category if typical else int(rng.integers(len(PATTERNS)))]
    exponent = EXPONENTS[int(rng.integers(len(EXPONENTS)))]
    noise = power_law_noise(rng, 3, *u.shape, exponent)
    base = pick_colour(rng, others)
    sign = 1.0 if rng.random() < 0.5 else -1.0
    tint = sign * (rng.uniform(0.14, 0.22) + rng.uniform(-0.06, 0.06, size=3))
    relief = _pattern(rng, name, u, v, noise[2])
    return _coloured(rng, noise, base) + relief[..., None] * tint, base
