"""How the steps report progress: a protocol, so that only the command line knows how it is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Stage(Protocol):
    """One running stage; ``advance`` is called as its units of work are finished, ``within`` during long ones."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Report ``n`` more finished units; ``note`` is a few words on the latest (a loss, a layer)."""

    def within(self, share: float, note: str = "") -> None:
        """Report how much of the unit under way is done, from 0 to 1; ``advance`` then counts the whole unit."""


class Progress(Protocol):
    """Opens stages. Stages of one run follow each other; they never nest."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Stage]:
        """Open a stage of ``total`` units; leaving the context closes it."""

    def tell(self, line: str) -> None:
        """Say one line that stays, a warning for example, within a stage or between two."""


class _SilentStage:
    def advance(self, n: int = 1, note: str = "") -> None:
        pass

    def within(self, share: float, note: str = "") -> None:
        pass


class NullProgress:
    """Draws nothing: for library use and tests."""

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        yield _SilentStage()

    def tell(self, line: str) -> None:
        """Say nothing."""
