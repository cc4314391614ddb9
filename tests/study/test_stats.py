"""Intervals against values worked out by hand, tables against what they must say."""

import csv
import io
import math

import pytest

from wsbcn_d2.study import mean_interval, summarize
from wsbcn_d2.study.stats import t_quantile
from wsbcn_d2.study.summary import (
    differences,
    markdown,
    runs_csv,
    summary_csv,
    table,
    task_label,
    tasks_of,
)

from .helpers import make_record


def test_t_quantile_of_one_and_two_degrees_has_a_closed_form():
    # df 1: tan(pi (p - 1/2)); df 2: (2p - 1) / sqrt(2 p (1 - p)).
    assert t_quantile(1) == pytest.approx(math.tan(math.pi * 0.475), rel=1e-5)
    assert t_quantile(2) == pytest.approx(0.95 / math.sqrt(2 * 0.975 * 0.025), rel=1e-4)


def _central_mass(t, degrees, steps=20000):
    """P(|T| <= t) by the trapezoid rule on Student's density."""
    log_c = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    scale = math.exp(log_c) / math.sqrt(degrees * math.pi)
    values = [
        (1 + (t * i / steps) ** 2 / degrees) ** (-(degrees + 1) / 2) for i in range(steps + 1)
    ]
    return 2 * scale * (sum(values) - (values[0] + values[-1]) / 2) * t / steps


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 17, 30, 31, 100])
def test_t_quantile_holds_95_percent(degrees):
    assert _central_mass(t_quantile(degrees), degrees) == pytest.approx(0.95, abs=2e-5)


def test_t_quantile_falls_towards_the_normal_one():
    values = [t_quantile(degrees) for degrees in range(1, 200)]
    assert values == sorted(values, reverse=True)
    assert values[-1] > 1.96
    with pytest.raises(ValueError):
        t_quantile(0)


def test_interval_by_hand():
    # 40, 42, 47: mean 43, sum of squares 9 + 1 + 16 = 26, variance 13; 4.3027 sqrt(13 / 3).
    mean, half = mean_interval([40.0, 42.0, 47.0])
    assert mean == 43.0
    assert half == pytest.approx(8.9567, abs=1e-3)
    assert mean_interval([5.0, 5.0]) == (5.0, 0.0)
    assert mean_interval([5.0]) == (5.0, None)
    with pytest.raises(ValueError):
        mean_interval([])


def _records():
    aps = {("gn", 1): [40, 42, 47], ("bcn_ws", 1): [50, 50, 50], ("gn", 2): [30]}
    return [
        make_record(variant, images, seed, box=float(ap))
        for (variant, images), values in aps.items()
        for seed, ap in enumerate(values, 1)
    ]


def test_summary():
    first, second, third = summarize(_records())
    assert (first.variant, first.images_per_step, first.seeds) == ("gn", 1, (1, 2, 3))
    assert first.ap["bbox"] == (43.0, pytest.approx(8.9567, abs=1e-3))
    assert (second.variant, second.ap["bbox"]) == ("bcn_ws", (50.0, 0.0))
    assert (third.images_per_step, third.ap["bbox"]) == (2, (30.0, None))


def test_markdown_and_csv():
    rows = summarize(_records())
    lines = markdown(*table(rows)).splitlines()
    assert len(lines) == 2 + len(rows)
    assert lines[0].startswith("| variant | images/step | box AP | mask AP | seeds |")
    assert "| gn | 1 | 43.0 ± 9.0 |" in lines[2]
    assert "| gn | 2 | 30.0 |" in lines[4]
    read = list(csv.DictReader(io.StringIO(summary_csv(rows))))
    assert float(read[0]["bbox_ap_ci95"]) == pytest.approx(8.957, abs=1e-3)
    assert read[2]["bbox_ap_ci95"] == ""
    points = list(csv.DictReader(io.StringIO(runs_csv(_records()))))
    assert len(points) == 7 * 2 * 2  # runs x tasks x evaluations
    assert {p["ap"] for p in points if p["seed"] == "3" and p["task"] == "bbox"} >= {"47.000"}


def test_every_cell_of_the_tables():
    measured = [(0.1, 7.0, 900), (0.4, 9.0, None), (0.3, 8.0, 700), (None, 3.0, 1000)]
    records = [
        make_record(
            "a|b", 2, seed, box=50.0, step_seconds=step, train_seconds=train, memory_mb=memory
        )
        for seed, (step, train, memory) in zip((4, 2, 3, 1), measured, strict=True)
    ]
    records.append(make_record("new", 2, 1, box=1.25, step_seconds=None, memory_mb=None))
    del records[-1]["ap"]["segm"], records[-1]["final_ap"]["segm"]
    rows = summarize(records)
    assert rows[0].seeds == (1, 2, 3, 4) and rows[0].max_iter == 50
    # Medians of 0.1 0.3 0.4, of 3 7 8 9, of 700 900 1000.
    assert (rows[0].step_seconds, rows[0].train_seconds, rows[0].memory_mb) == (0.3, 7.5, 900)
    assert markdown(*table(rows)).splitlines() == [
        "| variant | images/step | box AP | mask AP | seeds | iterations | learning rate | s/step "
        "| training s | memory MB |",
        "| " + " | ".join(["---"] * 10) + " |",
        "| a\\|b | 2 | 50.0 ± 0.0 | 49.0 ± 0.0 | 4 | 50 | 0.02 | 0.300 | 8 | 900 |",
        "| new | 2 | 1.2 | - | 1 | 50 | 0.02 | - | 20 | - |",
    ]
    assert summary_csv(rows).splitlines() == [
        "variant,images_per_step,bbox_ap_mean,bbox_ap_ci95,segm_ap_mean,segm_ap_ci95,seeds,"
        "max_iter,learning_rate,step_seconds,train_seconds,memory_mb",
        "a|b,2,50.000,0.000,49.000,0.000,1 2 3 4,50,0.02,0.3,7.5,900",
        "new,2,1.250,,,,1,50,0.02,,20.0,",
    ]
    assert runs_csv(records[-1:]).splitlines() == [
        "variant,images_per_step,seed,task,iteration,train_seconds,ap",
        "new,2,1,bbox,25,10.0,0.000",
        "new,2,1,bbox,50,20.0,1.250",
    ]


def test_a_task_that_a_seed_lacks_is_none_of_the_rows():
    one, two = make_record(seed=1), make_record(seed=2)
    del two["ap"]["segm"], two["final_ap"]["segm"]
    for records in ([one, two], [two, one]):
        (row,) = summarize(records)
        assert list(row.ap) == ["bbox"]


def test_rows_are_by_images_then_in_the_order_of_their_appearance():
    records = [make_record(v, n) for v, n in (("z", 2), ("a", 1), ("z", 1), ("a", 2))]
    found = [(row.variant, row.images_per_step) for row in summarize(records)]
    assert found == [("z", 1), ("a", 1), ("z", 2), ("a", 2)]


def test_differences_are_those_of_the_variants():
    records = [
        make_record("gn", 1, 1, settings={"MODEL.FPN.NORM": "GN"}),
        make_record("gn", 2, 1, settings={"MODEL.FPN.NORM": "GN", "SOLVER.BASE_LR": 0.02}),
        make_record("none", 1, 2, settings={}),
    ]
    head, lines = differences(records)
    assert head == ["key", "gn", "none"]
    assert lines == [["MODEL.FPN.NORM", "GN", ""]]  # neither the seed nor the 2 images' rate


def test_what_results_are_called():
    names = ("bbox", "segm", "keypoints", "classification", "sem_seg")
    assert [task_label(name) for name in names] == [
        *("box AP", "mask AP", "keypoint AP", "top-1 accuracy", "sem_seg AP")
    ]
    assert tasks_of([{"segm": 1, "bbox": 2}, {"keypoints": 3, "bbox": 0}]) == [
        *("bbox", "keypoints", "segm")
    ]
