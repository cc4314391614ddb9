"""How far two results are from each other."""


def error(got, want):
    """Root mean square of the difference over that of the expected tensor (float64)."""
    assert got.shape == want.shape, (got.shape, want.shape)
    difference = (got.double() - want.double()).square().mean().sqrt()
    return float(difference / want.double().square().mean().sqrt())
