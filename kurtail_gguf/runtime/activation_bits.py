"""To how many bits the runtime rounds the inputs of kt4 products: what it is asked for, and what it reports."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: What the file says, whatever the runtime's default and ``KURTAIL_ACTIVATION_BITS``.
FILE_BITS = "file"
#: What can be asked for; None asks for nothing: the runtime's default, which depends on the machine.
ACTIVATION_CHOICES = ("4", "8", FILE_BITS)

#: The variable that asks where no option does.
VARIABLE = "KURTAIL_ACTIVATION_BITS"
#: The option among the overrides of a file's keys (cpp_patches/src/llama/kurtail-option.h).
OVERRIDE_KEY = "kurtail.run.activation_bits"

#: "kurtail_load_activation_bits: activations: 4 bits (8 in 3 of 14 tensors), as the file says"
_REPORTED = re.compile(r"activations: (\d+) bits(?: \((\d+) in \d+ of \d+ tensors\))?, (.+)")


@dataclass(frozen=True, slots=True)
class Activations:
    """What the runtime reported of a file with kt4 tensors.

    Args:
        bits: that were in force; ``4+8`` where some products had 8.
        why: ``as the file says``, ``as --activation-bits asks; the file says 4``.
    """

    bits: str
    why: str

    @property
    def general(self) -> int:
        """The bits of all products but exceptions."""
        return int(self.bits.partition("+")[0])

    def applied(self, runs_as: str) -> str:
        """What a file runs as (``W4A4KV4``) with these bits in place of its own."""
        return re.sub(r"^(W\d+)A[\d+]+", rf"\1A{self.bits}", runs_as)


def activation_arguments(choice: str | None) -> list[str]:
    """Options of llama.cpp's programs for one of :data:`ACTIVATION_CHOICES`, none for None."""
    return [] if choice is None else ["--activation-bits", choice]


def reported_activations(log: str) -> Activations | None:
    """What a log says last; None where nothing was rounded, or the log does not go that far (``-lv 4``)."""
    found = None
    for found in _REPORTED.finditer(log):
        pass
    return None if found is None else Activations("+".join(filter(None, found.group(1, 2))), found[3].strip())


def told_activations(message: Mapping[str, Any]) -> Activations | None:
    """The same from a worker's message."""
    told = message["activations"]
    return None if told is None else Activations(**told)
