"""Draws progress: a bar with percent, elapsed time and ETA, or plain lines where there is no terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bars,
)

from kurtail_gguf.messages.progress import Progress, Stage

#: Seconds of the past that a bar's ETA rests on: the whole stage. Rich's 30 show none where a unit takes longer.
_ETA_PERIOD = 1e9
#: Seconds between plain lines of one stage.
_PLAIN_INTERVAL = 10.0


def make_progress(console: Console) -> Progress:
    """What fits the console: standard error, so that results on standard output stay clean."""
    return BarProgress(console) if console.is_terminal else PlainProgress(console)


class BarProgress:
    """A bar for each stage; a finished one stays above the next."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        """Open a stage; see kurtail_gguf.messages.progress."""
        bars = Bars(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), MofNCompleteColumn(),
            TextColumn("elapsed"), TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(),
            TextColumn("memory"), TextColumn("{task.fields[memory]}"), TextColumn("[dim]{task.fields[note]}"),
            console=self._console, speed_estimate_period=_ETA_PERIOD, get_time=time.monotonic,
        )  # fmt: skip
        with bars:
            yield _Bar(bars, bars.add_task(name, total=total, note="", memory=_memory()))

    def tell(self, line: str) -> None:
        """Print a line, above the bar where one is drawn; see kurtail_gguf.messages.progress."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class _Bar:
    def __init__(self, bars: Bars, task: TaskID) -> None:
        self._bars = bars
        self._task = task
        self._done = 0

    def advance(self, n: int = 1, note: str = "") -> None:
        self._done += n
        self.within(0, note)

    def within(self, share: float, note: str = "") -> None:
        self._bars.update(self._task, completed=self._done + share, note=note, memory=_memory())


class PlainProgress:
    """A line when a stage opens and closes, and every few seconds between."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        """Open a stage; see kurtail_gguf.messages.progress."""
        line = _PlainStage(self._console, name, total)
        self._print(f"{name} …")
        yield line
        self._print(f"{name}: done in {format_seconds(line.elapsed)}")

    def tell(self, line: str) -> None:
        """Print a line; see kurtail_gguf.messages.progress."""
        self._print(line)

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


class _PlainStage:
    def __init__(self, console: Console, name: str, total: int) -> None:
        self._console = console
        self._name = name
        self._total = total
        self._done = 0
        self._start = self._printed = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def advance(self, n: int = 1, note: str = "") -> None:
        self._done += n
        self.within(0, note)

    def within(self, share: float, note: str = "") -> None:
        now = time.monotonic()
        done = self._done + share
        if now - self._printed < _PLAIN_INTERVAL or not done:
            return
        self._printed = now
        remaining = self.elapsed / done * max(0, self._total - done)
        percent = math.floor(100 * done / max(1, self._total))
        text = (
            f"{self._name}: {percent}% ({self._done}/{self._total}), "
            f"elapsed {format_seconds(self.elapsed)}, ETA {format_seconds(remaining)}, memory {_memory()} {note}"
        )
        self._console.print(text.rstrip(), highlight=False, markup=False, soft_wrap=True)


def _memory() -> str:
    """What this process has in memory now."""
    return f"{psutil.Process().memory_info().rss / 1e9:.1f} GB"


def format_seconds(seconds: float) -> str:
    """``7 s``, ``3:05`` or ``1:02:03``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
