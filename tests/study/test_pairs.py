"""Differences, paired by seed: against values worked out by hand and SciPy's own test."""

import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from wsbcn_d2.study import compare_pairs
from wsbcn_d2.study.pairs import pairs_csv, pairs_table
from wsbcn_d2.study.stats import Difference, paired_difference
from wsbcn_d2.study.summary import markdown

from .helpers import make_record


def test_a_difference_by_hand():
    # 1, 2, 3 on the common seeds: mean 2, deviation 1; 4.3027 / sqrt(3).
    found = paired_difference({1: 40.0, 2: 42.0, 3: 47.0, 9: 0.0}, {3: 44.0, 2: 40.0, 1: 39.0})
    assert found == Difference((1, 2, 3), 2.0, pytest.approx(2.4841, abs=1e-4))
    assert not found.excludes_zero
    assert str(found) == "+2.0 ± 2.5"
    # A common scatter of the seeds, however large, drops out.
    wide = {1: 10.0, 2: 50.0, 3: 90.0}
    found = paired_difference({s: v - 2 + s / 10 for s, v in wide.items()}, wide)
    assert (found.mean, found.half) == (pytest.approx(-1.8), pytest.approx(0.24841, abs=1e-5))
    assert found.excludes_zero and str(found) == "-1.8 ± 0.2"


def test_one_common_seed_shows_nothing_and_none_is_no_difference():
    found = paired_difference({1: 9.0}, {1: 1.0, 2: 2.0})
    assert found == Difference((1,), 8.0, None)
    assert not found.excludes_zero and str(found) == "+8.0"
    assert paired_difference({1: 9.0}, {2: 1.0}) is None


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(*[st.integers(0, 600)] * 2), min_size=2, max_size=8))
def test_zero_is_excluded_where_the_paired_t_test_says_so(values):
    one, two = ([x / 10 for x in side] for side in zip(*values, strict=True))
    found = paired_difference(dict(enumerate(one)), dict(enumerate(two)))
    if len({round(a - b, 6) for a, b in zip(one, two, strict=True)}) > 1:
        interval = ttest_rel(one, two).confidence_interval(0.95)
        assert found.mean - found.half == pytest.approx(interval.low)
        assert found.mean + found.half == pytest.approx(interval.high)
        assert found.excludes_zero == (interval.low > 0 or interval.high < 0)


def records_of(**variants):
    return [
        make_record(variant, images, seed, box=float(box), **more)
        for variant, (images, boxes, more) in variants.items()
        for seed, box in boxes.items()
    ]


def test_all_that_can_be_compared_is_and_nothing_else():
    records = records_of(
        gn=(1, {1: 40, 2: 42, 3: 47}, {}),
        ws=(1, {1: 50, 2: 52.2, 3: 56.8, 4: 0}, {}),
        one=(1, {1: 10}, {}),
        long=(1, {1: 60, 2: 60}, {"max_iter": 500}),
    ) + records_of(gn=(2, {1: 30, 2: 30}, {}), ws=(2, {1: 20, 2: 30}, {}))
    pairs = compare_pairs(records)
    assert [(p.variant, p.other, p.images_per_step) for p in pairs] == [
        ("ws", "gn", 1),
        ("ws", "gn", 2),
    ]
    first, second = pairs
    assert first.ap["bbox"].seeds == (1, 2, 3)
    assert first.ap["bbox"].mean == pytest.approx(10.0)
    assert first.statement == "ws is ahead in box AP and mask AP"
    assert second.ap["bbox"].mean == -5 and second.statement == "nothing shown"


def test_tasks_are_stated_one_by_one():
    records = records_of(gn=(1, {1: 40, 2: 40, 3: 40}, {}), ws=(1, {1: 41, 2: 41.1, 3: 41}, {}))
    for record, mask in zip(records[3:], (30, 30.1, 30), strict=True):
        record["final_ap"]["segm"] = mask
    (pair,) = compare_pairs(records)
    assert pair.statement == "ws is ahead in box AP; gn is ahead in mask AP"
    for record, mask in zip(records[3:], (0, 40, 80), strict=True):
        record["final_ap"]["segm"] = mask
    assert compare_pairs(records)[0].statement == "ws is ahead in box AP"


def test_tables():
    records = records_of(gn=(1, {1: 40, 2: 42}, {}), ws=(1, {1: 50, 2: 53}, {}))
    pairs = compare_pairs(records)
    lines = markdown(*pairs_table(pairs)).splitlines()
    assert lines[0] == "| difference | images/step | box AP | mask AP | seeds | shown |"
    # 10 and 11: 12.7062 x 0.5.
    assert lines[2] == "| ws - gn | 1 | +10.5 ± 6.4 | +10.5 ± 6.4 | 2 | " + (
        "ws is ahead in box AP and mask AP |"
    )
    (row,) = csv.DictReader(io.StringIO(pairs_csv(pairs)))
    assert (row["variant"], row["minus"], row["seeds"]) == ("ws", "gn", "1 2")
    assert float(row["bbox_ap_mean"]) == 10.5
    assert float(row["segm_ap_ci95"]) == pytest.approx(6.353, abs=1e-3)


def test_a_name_with_a_bar_stays_one_cell():
    records = records_of(**{"a|b": (1, {1: 4, 2: 5}, {}), "c": (1, {1: 4, 2: 5}, {})})
    for line in markdown(*pairs_table(compare_pairs(records))).splitlines():
        assert line.replace(r"\|", "").count("|") == 7
