"""Figures by what they draw: every line, band, bar and dot is where the records say."""

import numpy as np
import pytest

from wsbcn_d2.study.plots import make_figures, png_bytes, showcase
from wsbcn_d2.study.stats import t_quantile

from .helpers import make_record

# 40, 42, 47: 43 +- 4.3027 sqrt(13 / 3).
GN, HALF = (40.0, 42.0, 47.0), 4.302653 * (13 / 3) ** 0.5
BLUE, ORANGE = (0, 0x72 / 255, 0xB2 / 255), (0xE6 / 255, 0x9F / 255, 0)


def records_of(variants, images=(1,)):
    return [
        make_record(variant, count, seed, box=box)
        for count in images
        for variant, boxes in variants.items()
        for seed, box in enumerate(boxes, 1)
    ]


@pytest.fixture(scope="module")
def figures():
    return make_figures(records_of({"gn": GN, "bcn_ws": (50.0,)}))


def band(ax):
    """x, lower and upper edge of the only band."""
    (collection,) = ax.collections
    (path,) = collection.get_paths()
    edges = {}
    for x, y in path.vertices:
        low, high = edges.get(x, (y, y))
        edges[x] = min(low, y), max(high, y)
    x = sorted(edges)
    return x, [edges[v][0] for v in x], [edges[v][1] for v in x]


@pytest.mark.parametrize(
    "name,x,label",
    [
        ("ap_over_iterations", [50, 100], "iteration"),
        ("ap_over_time", [10, 20], "seconds of training steps"),
    ],
)
def test_curves_and_their_bands(figures, name, x, label):
    box, mask = figures[name].axes
    assert (box.get_xlabel(), box.get_ylabel(), mask.get_ylabel()) == (label, "box AP", "mask AP")
    for ax, less in ((box, 0), (mask, 1)):
        gn, bcn = ax.lines
        assert gn.get_xdata().tolist() == bcn.get_xdata().tolist() == x
        assert gn.get_ydata() == pytest.approx([0, 43 - less])
        assert bcn.get_ydata() == pytest.approx([0, 50 - less])
        assert gn.get_color() == "#0072B2" and bcn.get_color() == "#E69F00"
        # On both sides of the mean; none for the single seed.
        where, low, high = band(ax)
        assert where == x
        assert low == pytest.approx([0, 43 - less - HALF], abs=1e-4)
        assert high == pytest.approx([0, 43 - less + HALF], abs=1e-4)
        assert ax.collections[0].get_facecolor()[0][:3] == pytest.approx(BLUE)


def test_bars_with_intervals_on_both_sides_and_a_dot_per_seed(figures):
    box, mask = figures["final_ap"].axes
    for ax, less in ((box, 0), (mask, 1)):
        bars = [c for c in ax.containers if hasattr(c, "patches")]
        assert [b.get_width() for c in bars for b in c] == pytest.approx([43 - less, 50 - less])
        segments = [s for c in ax.collections for s in c.get_segments()]
        ((left, right),) = [s[:, 0] for s in segments if not np.isnan(s).any()]
        assert (left, right) == pytest.approx((43 - less - HALF, 43 - less + HALF), abs=1e-4)
        dots = [line for line in ax.lines if line.get_marker() == "."]
        assert [d.get_xdata().tolist() for d in dots] == [[v - less for v in GN], [50 - less]]
        assert [set(d.get_ydata()) for d in dots] == [{0}, {1}]
        assert [t.get_text() for t in ax.get_yticklabels()] == ["gn, 1 img", "bcn_ws, 1 img"]
        grids = ax.get_xgridlines(), ax.get_ygridlines()
        assert [any(line.get_visible() for line in grid) for grid in grids] == [True, False]


def test_no_axis_goes_below_an_ap_of_0():
    """Also where an interval would."""
    figures = make_figures(records_of({"gn": (0.5, 9.0), "ws": (1.0, 2.0)}))
    assert [ax.get_xlim()[0] for ax in figures["final_ap"].axes] == [0, 0]
    for name in ("ap_over_iterations", "ap_over_time"):
        assert [ax.get_ylim()[0] for ax in figures[name].axes] == [0, 0]
    box = figures["final_ap"].axes[0]
    assert box.get_xlim()[1] > 4.75 + 12.706 * 4.25  # and all of it above


def test_each_number_of_images_has_its_own_axes():
    figures = make_figures(records_of({"gn": GN}, images=(1, 2)))
    one, two = figures["ap_over_iterations"].axes[:2]
    assert [ax.get_title() for ax in (one, two)] == ["1 image per step", "2 images per step"]
    assert [ax.lines[0].get_xdata().tolist() for ax in (one, two)] == [[50, 100], [25, 50]]
    assert len(figures["final_ap"].axes[0].patches) == 2


def test_losses_and_channels_are_means_without_bands():
    first, second = (make_record("gn", seed=seed) for seed in (1, 2))
    second["loss"] = [[19, 5.0], [39, 4.0]]
    second["channels"] = {name: [[49, 0.3], [99, 0.4]] for name in second["channels"]}
    figures = make_figures([first, second])
    (loss,) = figures["loss"].axes
    assert loss.lines[0].get_xdata().tolist() == [19, 39]
    assert loss.lines[0].get_ydata() == pytest.approx([4, 3])
    titles = [ax.get_title() for ax in figures["channels"].axes[:2]]
    assert titles == ["backbone", "fpn"]
    for ax in figures["channels"].axes:  # inactive and shift, of backbone and FPN
        assert ax.lines[0].get_ydata() == pytest.approx([0.2, 0.3])
    assert not any(ax.collections for name in ("loss", "channels") for ax in figures[name].axes)


def words(axes, what):
    return [getattr(ax, f"get_{what}")() for ax in axes]


def test_axes_say_what_they_show():
    figures = make_figures(records_of({"gn": GN, "bcn_ws": (50.0,)}, images=(1, 2)))
    axes = figures["ap_over_time"].axes
    assert words(axes, "xlabel") == ["seconds of training steps"] * 4
    assert words(axes, "ylabel") == ["box AP"] * 2 + ["mask AP"] * 2
    assert words(figures["final_ap"].axes, "xlabel") == ["box AP", "mask AP"]
    assert [ax.yaxis_inverted() for ax in figures["final_ap"].axes] == [True, True]
    loss = figures["loss"].axes
    assert words(loss, "title") == ["1 image per step", "2 images per step"]
    assert words(loss, "xlabel") == ["iteration"] * 2
    assert words(loss, "ylabel") == ["training loss", ""]
    channels = figures["channels"].axes  # at the fewest images per step
    assert words(channels, "title") == ["backbone", "fpn", "", ""]
    assert words(channels, "xlabel") == ["", "", "iteration", "iteration"]
    assert words(channels, "ylabel") == [
        *("share of inactive channels", ""),
        *("|mean| / std of a channel", ""),
    ]
    assert [len(ax.lines) for ax in channels] == [2] * 4
    for name, figure in figures.items():
        for ax in figure.axes:  # nothing is made to look larger than it is
            low = ax.get_xlim()[0] if name == "final_ap" else ax.get_ylim()[0]
            assert name == "loss" or low == 0
        for legend in figure.legends:
            assert [text.get_text() for text in legend.get_texts()] == ["gn", "bcn_ws"]
        assert len(figure.legends) == (name != "final_ap")


def test_a_point_lies_at_the_mean_of_the_seeds_times():
    records = records_of({"gn": (10.0, 10.0, 10.0)})
    for record, seconds in zip(records, (12.0, 24.0, 60.0), strict=True):
        for curve in record["ap"].values():
            curve[0][1], curve[1][1] = seconds, 2 * seconds
    box, _ = make_figures(records)["ap_over_time"].axes
    assert box.lines[0].get_xdata() == pytest.approx([32, 64])
    assert band(box)[0] == pytest.approx([32, 64])


def test_a_seed_without_a_curve_leaves_the_others_theirs():
    records = records_of({"gn": GN[:2]})
    records[1]["ap"] = {"bbox": records[1]["ap"]["bbox"]}
    _, mask = make_figures(records)["ap_over_iterations"].axes
    assert mask.lines[0].get_ydata() == pytest.approx([0, 39])
    assert not mask.collections


def test_the_showcase():
    strip = {name: np.full((4, 5, 3), i, np.uint8) for i, name in enumerate(["truth", "gn", "$a$"])}
    records = records_of({"gn": GN, "bcn_ws": (50.0,)}, images=(1, 2))
    figure = showcase(records, strip)
    box, mask, *pictures = (ax for sub in figure.subfigs for ax in sub.axes)
    for ax, less in ((box, 0), (mask, 1)):
        gn, bcn = ax.lines  # at one image per step, from the start
        assert gn.get_xdata().tolist() == [0, 50, 100]
        assert gn.get_ydata() == pytest.approx([0, 0, 43 - less])
        assert band(ax)[1:] == (
            pytest.approx([0, 0, 43 - less - HALF], abs=1e-4),
            pytest.approx([0, 0, 43 - less + HALF], abs=1e-4),
        )
    (legend,) = figure.subfigs[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["gn (3)", "bcn_ws (1)"]
    assert [ax.get_title().replace(r"\$", "$") for ax in pictures] == list(strip)
    for ax, pixels in zip(pictures, strip.values(), strict=True):
        assert np.array_equal(ax.images[0].get_array(), pixels)
    assert png_bytes(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("variant", [r"$\frac$", "$", "a$b$", "_gn", "<&>", "gn LR=0.1", "ü"])
def test_any_name_of_a_variant_can_be_drawn_and_is_in_the_legend(variant):
    figures = make_figures(records_of({variant: (1.0, 2.0), "other": (3.0,)}))
    for figure in figures.values():
        assert png_bytes(figure).startswith(b"\x89PNG")
    (legend,) = figures["ap_over_iterations"].legends
    shown = [text.get_text().replace(r"\$", "$").strip() for text in legend.get_texts()]
    assert shown == [variant, "other"]


def test_equal_records_give_equal_bytes():
    one, two = (make_figures(records_of({"gn": GN})) for _ in range(2))
    assert {k: png_bytes(f) for k, f in one.items()} == {k: png_bytes(f) for k, f in two.items()}


def test_a_figure_has_room_for_its_axes():
    """Two tasks by one number of images, six bars; nothing lies over anything else."""
    records = records_of({"gn": GN, "bcn_ws": (50.0,)}, (1, 2, 4))
    figures = make_figures(records)
    sizes = {name: figure.get_size_inches().tolist() for name, figure in figures.items()}
    assert sizes["ap_over_iterations"] == pytest.approx([3 * 5.2, 2 * 3.4])
    assert sizes["final_ap"] == pytest.approx([2 * 5.2, 1.2 + 6 * 0.32])
    strip = {name: np.zeros((8, 8, 3), np.uint8) for name in ("truth", "gn")}
    for name, figure in (figures | {"showcase": showcase(records, strip)}).items():
        assert type(figure.get_layout_engine()).__name__ == "ConstrainedLayoutEngine", name


@pytest.mark.parametrize("images", [(1,), (1, 2)])
def test_the_legend_of_a_study_lies_within_the_figure(images):
    names = ("bn", "gn", "bcn", "gn_ws", "bcn_ws", "bcn_ws_held")
    figures = make_figures(records_of({name: (1.0, 2.0) for name in names}, images))
    for name, figure in figures.items():
        png_bytes(figure)  # lays it out
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert 0 <= box.x0 < box.x1 <= figure.bbox.x1, name
    (legend,) = figures["ap_over_iterations"].legends
    assert legend._ncols == (3 if images == (1,) else 5)  # six names: in two rows


def test_final_ap_over_learning_rates():
    records = []
    for rate, boxes in ((0.02, (3.0, 5.0)), (0.01, (7.0, 8.0))):
        for seed, box in enumerate(boxes):
            record = make_record(f"gn BASE_LR={rate:g}", seed=seed, box=box)
            records.append({**record, "learning_rate": rate})
    assert "ap_over_learning_rate" not in make_figures(records[:2])  # one rate is no curve
    records.append({**make_record("bn", box=1.0), "learning_rate": 0.02})
    figure = make_figures(records)["ap_over_learning_rate"]
    box, mask = figure.axes
    assert (box.get_ylabel(), mask.get_ylabel()) == ("box AP", "mask AP")
    (bars,) = box.containers
    line, _, (bar,) = bars
    assert bars.get_label() == "gn" and line.get_xydata().tolist() == [[0.01, 7.5], [0.02, 4.0]]
    half = t_quantile(1) * 0.5  # of two seeds that are one apart
    assert bar.get_segments()[0][:, 1] == pytest.approx([7.5 - half, 7.5 + half])
    assert [text.get_text() for text in box.get_xticklabels()] == ["0.01", "0.02"]
    assert box.get_xscale() == "log"
    # A detector without masks beside them has its boxes alone.
    for record in [r for r in records if r["variant"].startswith("gn")]:
        boxes = {"bbox": record["final_ap"]["bbox"]}
        variant = record["variant"].replace("gn", "boxes")
        records.append({**record, "variant": variant, "final_ap": boxes})
    box, mask = make_figures(records)["ap_over_learning_rate"].axes
    assert [len(bars[0].get_xdata()) for bars in box.containers] == [2, 2]
    assert [len(bars[0].get_xdata()) for bars in mask.containers] == [2, 0]
    # One seed has a point and no bar.
    figure = make_figures([r for r in records if r["seed"] == 0])["ap_over_learning_rate"]
    assert figure.axes[0].containers[0][0].get_xydata().tolist() == [[0.01, 7.0], [0.02, 3.0]]
