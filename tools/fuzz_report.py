"""What tools/fuzz reads out of the harness's output: whose a crash is, what was covered. Standard library only."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

OURS = "cpp_patches/src/"
FRAME = re.compile(r"^\s+#\d+ 0x[0-9a-f]+ in (?P<function>.+?) (?P<place>/\S+?:\d+)(?::\d+)?$", re.M)
# what ends a process; AddressSanitizer and libFuzzer name it alike
HEAD = re.compile(r"^(?:==\d+==\s*)?ERROR: (?:AddressSanitizer|libFuzzer): (?P<what>.*)$|^(?=.*cpp_patches/src/).*: runtime error: (?P<undefined>.*)$", re.M)


@dataclass(frozen=True)
class Finding:
    """A way to end the process. Equal ones are the same."""

    ours: bool  # one of our sources is on the stack
    text: str  # what it is and where


def _short(place: str) -> str:
    """A source's path without the machine's part."""
    for root in ("cpp_patches/src/", "vendor/llama.cpp/"):
        if root in place:
            return place[place.index(root) :]
    return place.rsplit("/", 1)[-1]


def _first_stack(text: str) -> list[str]:
    """Places of a report's first stack, innermost first."""
    start = FRAME.search(text)
    if start is None:
        return []
    block = text[start.start() :].split("\n\n", 1)[0]
    return [match["place"] for match in FRAME.finditer(block)]


def finding(output: str) -> Finding | None:
    """What ended a replay, or None where it ended by itself.

    A crash with one of our sources on its stack is ours, whoever's line it happened in: ours called it so.
    """
    if claim := re.search(r"^assertion in our sources: (.*)$", output, re.M):
        return Finding(True, f"assertion: {_short(claim[1])}")
    head = HEAD.search(output)
    if head is None:
        return None
    if head["undefined"] is not None:
        return Finding(True, f"undefined behaviour: {_short(head[0].split(': runtime error')[0])}: {head['undefined']}")
    stack = [place for place in _first_stack(output[head.end() :]) if OURS in place or "vendor/llama.cpp/" in place]
    what = re.sub(r" (?:on|at|in) (?:unknown )?address.*| \(.*|0x[0-9a-f]+|: (?:libFuzzer|requested).*| trying to allocate.*", "", head["what"]).strip()
    mine = [place for place in stack if OURS in place]
    return Finding(bool(mine), f"{what}: {_short((mine or stack or ['?'])[0])}")


def coverage(exported: str) -> dict[str, tuple[int, int]]:
    """Lines reached and lines there are, of each of our sources, out of ``llvm-cov export -summary-only``."""
    lines = {}
    for file in json.loads(exported)["data"][0]["files"]:
        if OURS in file["filename"]:
            summary = file["summary"]["lines"]
            lines[file["filename"].split(OURS, 1)[1]] = (summary["covered"], summary["count"])
    return lines


def upstream_notes(output: str) -> list[str]:
    """Upstream's assertions and undefined behaviour that the harness went past, each once."""
    aborts = re.findall(r"^upstream aborts: (.*)$", output, re.M)
    undefined = [f"{_short(place)}: {what}" for place, what in re.findall(r"^(/\S+?:\d+):\d+: runtime error: (.*)$", output, re.M) if OURS not in place]
    return sorted({f"assertion: {line}" for line in aborts}) + sorted({f"undefined behaviour: {line}" for line in undefined})
