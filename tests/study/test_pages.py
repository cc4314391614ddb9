"""Tables within pages come from records, and all else stays as it was."""

import pytest

from wsbcn_d2.study.pages import fill_page, prose

from .helpers import make_record

PAGE = """# Title
<!-- ap: one -->
anything
| by hand | 99.9 |
<!-- end -->
between, 12.5
<!-- pairs: set/one -->
<!-- end -->
<!-- channels: one -->
<!-- end -->
end <!-- a comment -->
"""


CHANNELS = """\
| variant | inactive: backbone | inactive: FPN | error / std | seeds |
| --- | --- | --- | --- | --- |
| gn | 20.0% | 20.0% | - | 2 |
| bcn | 20.0% | 20.0% | 0.45 | 2 |
"""


def records():
    found = [
        make_record(variant, 1, seed, box=box + seed)
        for variant, box in (("gn", 10.0), ("bcn", 20.0))
        for seed in (1, 2)
    ]
    for record, error in zip(found[2:], (0.1, 0.3), strict=True):
        record["channels"]["channels/backbone/estimate_error_mean"] = [
            [9, error],
            [19, error + 0.1],
            [29, error + 0.65],  # means of the curve, 0.35 and 0.55, and of the seeds
        ]
    return found


def test_tables_are_made_and_the_rest_is_kept():
    asked = []

    def records_of(name):
        asked.append(name)
        return records()

    page = fill_page(PAGE, records_of)
    assert asked == ["one", "set/one", "one"]
    assert prose(page) == prose(PAGE) and "between, 12.5" in prose(page)
    assert "by hand" not in page and "99.9" not in page
    assert "| gn | 11.5 ± 6.4 | 10.5 ± 6.4 | 2 | 0.01 |\n" in page  # 12.7062 x 0.5
    assert (
        "| bcn - gn | +10.0 ± 0.0 | +10.0 ± 0.0 | 2 | bcn is ahead in box AP and mask AP |" in page
    )
    assert CHANNELS in page
    assert fill_page(page, records_of) == page


def test_images_per_step_are_a_column_where_they_differ():
    both = [*records(), make_record("gn", 2, 1, box=3.0)]
    page = fill_page("<!-- ap: x -->\n<!-- end -->", lambda name: both)
    assert "| variant | images/step |" in page and "| gn | 2 | 3.0 | 2.0 | 1 | 0.02 |" in page


def test_two_images_alone_are_said_too():
    page = fill_page(
        "<!-- ap: x -->\n<!-- end -->", lambda name: [make_record("gn", 2, 1, box=3.0)]
    )
    assert "| gn | 2 | 3.0 | 2.0 | 1 | 0.02 |" in page


def test_the_lowest_is_that_of_the_worst_seed():
    page = fill_page("<!-- lowest: x -->\n<!-- end -->", lambda name: records())
    assert page.splitlines()[1:-1] == [
        "| variant | lowest box AP | lowest mask AP | of seeds |",
        "| --- | --- | --- | --- |",
        "| gn | 11.0 | 10.0 | 2 |",
        "| bcn | 21.0 | 20.0 | 2 |",
    ]


def test_a_page_may_bring_tables_of_its_own():
    page = "<!-- costs: it -->\n<!-- end --><!-- ap: it -->\n<!-- end -->"
    filled = fill_page(page, lambda name: records(), {"costs": lambda made: f"{len(made)} of it\n"})
    assert filled.startswith("<!-- costs: it -->\n4 of it\n<!-- end -->") and "| gn |" in filled
    with pytest.raises(ValueError, match="ap, lowest, pairs, channels, costs"):
        fill_page("<!-- cost: it -->\n<!-- end -->", None, {"costs": len})


def test_a_table_that_there_is_not():
    with pytest.raises(ValueError, match=r"unknown table 'app'.*ap, lowest, pairs, channels"):
        fill_page("<!-- app: x -->\n<!-- end -->", lambda name: records())
