"""Commands, as scripts in tools/ and, once installed, as wsbcn-train, wsbcn-predict, ..."""

import functools
import sys
from collections.abc import Callable

from ..checkpoint import CheckpointError
from ..data import DataError
from ..engine import UsageError

__all__ = ["one_line_errors"]


def one_line_errors(command: Callable[..., int | None]) -> Callable[..., int]:
    """Answer wrong input with one line on stderr and exit code 2.

    Args:
        command: takes the words of the command line; its result is the exit code, None for 0.
    """

    @functools.wraps(command)
    def run(argv: list[str] | None = None) -> int:
        try:
            return command(argv) or 0
        except (UsageError, CheckpointError, DataError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return run
