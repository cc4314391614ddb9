"""Comparing variants of a detector over seeds: planning runs, running them, reporting.

``tools/compare.py`` is the command line. Each run is a process of ``tools/train_net.py``; what it
leaves is a small JSON record, and every number of the report comes from such records.
"""

from .pairs import Pair, compare_pairs
from .plan import Run, make_plan
from .records import find_records, make_record, matching, write_record
from .report import write_report
from .runner import Failure, run_all
from .stats import Difference, mean_interval, paired_difference
from .summary import Row, summarize

__all__ = [
    "Difference",
    "Failure",
    "Pair",
    "Row",
    "Run",
    "compare_pairs",
    "find_records",
    "make_plan",
    "make_record",
    "matching",
    "mean_interval",
    "paired_difference",
    "run_all",
    "summarize",
    "write_record",
    "write_report",
]
