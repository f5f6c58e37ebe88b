#!/usr/bin/env python3
"""Write docs/architectures.md: what becomes of each architecture that the pinned upstream's converter knows.

Run with the Python of .venv, where the package is installed: ``.venv/bin/python tools/architectures.py``.
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from kurtail_gguf.convert.by_itself.architectures import BY_ITSELF, OWN, REFUSED, Way, ways

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "architectures.md"
#: Where the architectures are listed that a tiny model of is converted and proven in the tests.
TESTS = sorted((ROOT / "tests" / "end_to_end").glob("test_by_itself*.py"))

HEAD = """# Architectures

What becomes of each architecture, as `architectures` in config.json names it, that the pinned upstream's converter knows; made
by `.venv/bin/python tools/architectures.py`.

- **own entry**: a file in `kurtail_gguf/model/families/` describes it: [families.md](families.md).
- **by itself**: its linears are found, what they read is transformed at run time, nothing is folded, and before anything is
  quantized the runtime's answers to a short text are compared with transformers': [families.md](families.md#by-itself). Those
  marked *proven* are converted so in the tests, as tiny random models; with the others it is the proof that decides, and one that
  fails ends the conversion with the first layer that differs.
- **refused**: with the reason.
"""


def proven() -> set[str]:
    """The architectures that the tests convert by themselves."""
    return {name for path in TESTS for name in re.findall(r'"([A-Za-z0-9_]+)": \(', path.read_text(encoding="utf-8"))}


def table(found: Iterable[Way], tested: set[str]) -> str:
    """The page's table, with how many of each kind there are before it."""
    found = list(found)
    counts = ", ".join(f"{sum(one.kind == kind for one in found)} {kind}" for kind in (OWN, BY_ITSELF, REFUSED))
    rows = [
        f"| `{one.architecture}` | {one.kind}{', *proven*' if one.kind == BY_ITSELF and one.architecture in tested else ''} "
        f"| {one.detail.replace('|', '/')} |"
        for one in found
    ]
    return "\n".join([f"{len(found)} architectures: {counts}.", "", "| architecture | way | detail |", "|---|---|---|", *rows, ""])


def main() -> int:
    OUT.write_text(f"{HEAD}\n{table(ways(), proven())}", encoding="utf-8")
    print(f"wrote {OUT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
