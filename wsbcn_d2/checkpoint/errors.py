"""The error type of this subpackage."""

import contextlib
from collections.abc import Iterator


class CheckpointError(ValueError):
    """A checkpoint that cannot be used as asked; the message is one line with the mend in it.

    Names from a file may be in it: what does not print becomes a space.
    """

    def __init__(self, text: object):
        super().__init__("".join(c if c.isprintable() else " " for c in str(text)))


@contextlib.contextmanager
def naming(file: str) -> Iterator[None]:
    """Puts a file's name before the errors of what is done with its content, once."""
    try:
        yield
    except CheckpointError as error:
        text = str(error)
        raise type(error)(text if text.startswith(f"{file}: ") else f"{file}: {text}") from error


class NotAdmittedError(CheckpointError):
    """A whole file with objects in it that are not read."""


def shortened(names, limit=4):
    """Joins names for an error line: ``"a, b and 12 more"``."""
    names = list(names)
    text = ", ".join(str(name) for name in names[:limit])
    return text if len(names) <= limit else f"{text} and {len(names) - limit} more"
