"""What goes wrong for reasons outside the program: one line for a person, never a traceback."""

from __future__ import annotations


class KurtailError(Exception):
    """An error whose message is one line: what is wrong, where, the limit, and the remedy.

    The command line prints the message and exits non-zero. Line breaks (from a library's own
    message, say) are folded into spaces, so that the promise of one line holds.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class ConfigError(KurtailError):
    """An option's value is outside what is offered, or two options contradict each other."""


class SourceError(KurtailError):
    """The model, recipe or checkpoint cannot be found or read."""


class UnsupportedArchitecture(SourceError):
    """The checkpoint's architecture is not one that can be converted exactly."""


class CalibrationError(KurtailError):
    """The calibration text is missing, unreadable or too short."""


class QuantizeError(KurtailError):
    """A tensor cannot be represented in the 4-bit format."""


class Differs(KurtailError):
    """What a file has that it should not have, in words, found while it is verified."""
