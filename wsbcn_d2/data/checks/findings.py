"""What a look at a data set finds: faults, one line a kind; notes; numbers."""

from dataclasses import dataclass, field

from ..errors import DataError

__all__ = ["Fault", "Findings", "shown"]


def shown(value: object) -> str:
    """A value of a file in a message: one line, and not a long one."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass
class Fault:
    """A kind of fault.

    Attributes:
        what: the kind.
        where: the first place.
        mend: what to do.
        count: how many places.
        test_only: whether only evaluation stumbles over it.
    """

    what: str
    where: str
    mend: str
    count: int = 1
    test_only: bool = False

    def __str__(self) -> str:
        more = f" and {self.count - 1} more" if self.count > 1 else ""
        return f"{self.what} ({self.where}{more}): {self.mend}"


@dataclass
class Findings:
    """What was found.

    Attributes:
        faults: by kind.
        notes: what is worth knowing, and no fault.
        facts: what the config is held against; plain types.
        key: by which it can be remembered (``memory.keep``); None where it is already, or cannot.
    """

    faults: dict[str, Fault] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    facts: dict = field(default_factory=dict)
    key: str | None = None

    def fault(self, what: str, where: str, mend: str, *, test_only: bool = False) -> None:
        """Add a place to a kind of fault."""
        if what in self.faults:
            self.faults[what].count += 1
        else:
            self.faults[what] = Fault(what, where, mend, test_only=test_only)

    def serious(self, *, test: bool = True) -> list[Fault]:
        """The faults, without those that only evaluation stumbles over unless ``test``."""
        return [fault for fault in self.faults.values() if test or not fault.test_only]

    def refuse(self, name: str, *, test: bool = True) -> None:
        """Raise the first fault, if there is one.

        Args:
            name: of the set, for the message.
            test: whether the set is evaluated on.

        Raises:
            DataError: one line.
        """
        serious = self.serious(test=test)
        if serious:
            more = f" (and {len(serious) - 1} other kinds: tools/check_dataset.py lists them)"
            raise DataError(f"{name}: {serious[0]}{more if len(serious) > 1 else ''}")
