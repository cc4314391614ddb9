"""A data set in a few lines: pictures, sizes, objects per picture and class."""

__all__ = ["summarize"]


def summarize(facts: dict) -> str:
    """Several lines about a set that was looked at, from its :class:`Findings`' facts."""
    images, objects = facts["images"], facts["objects"]
    (low_w, low_h), (high_w, high_h) = facts["sizes"]
    names = dict(facts["categories"])
    sizes = ("small", "medium", "large")
    shares = [f"{100 * facts[size] / max(objects, 1):.0f} % {size}" for size in sizes]
    lines = [
        f"pictures   {images}, of {low_w} x {low_h} to {high_w} x {high_h} pixels; "
        f"{images - facts['with_objects']} without objects",
        f"objects    {objects}, {objects / max(images, 1):.1f} per picture; {', '.join(shares)} "
        "(below 32 x 32, 96 x 96 pixels, above)",
        f"masks      {facts['polygons']} polygons, {facts['rle']} run lengths, "
        f"{facts['unmasked']} objects without; {facts['crowds']} crowd regions",
    ]
    if facts["keypoints"]:
        lines.append(f"keypoints  {facts['keypoints']} objects, {facts['points']} points each")
    counts = facts["per_class"]
    width = max((len(str(name)) for name in names.values()), default=0)
    lines.append(f"classes    {len(names)}")
    lines += [f"  {names[key]:<{width}}  {counts[str(key)]}" for key in names]
    return "\n".join(lines)
