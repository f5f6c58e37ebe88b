"""Prompts that test retrieval: facts told early in a long text and asked for at its end.

One context holds a fact at every depth, each about another city, so that the facts differ in one word and
the code. Every question continues the same prefix, and the runtime computes that prefix once.

What is drawn depends on the seed, the length and the repetition, not on the vocabulary: two models are
asked for the same codes.
"""

from __future__ import annotations

import os
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kurtail_gguf.messages.errors import KurtailError

CITIES = (
    "Accra", "Antwerp", "Bogota", "Bristol", "Cairo", "Calgary", "Chennai", "Cordoba", "Dakar", "Denver", "Dublin", "Durban",
    "Fukuoka", "Geneva", "Hanoi", "Helsinki", "Istanbul", "Jakarta", "Karachi", "Kingston", "Krakow", "Lagos", "Lima", "Lisbon",
    "Manila", "Mumbai", "Nairobi", "Oslo", "Palermo", "Perth", "Quito", "Riga", "Seville", "Sydney", "Tampa", "Tunis",
    "Utrecht", "Vienna", "Warsaw", "Zagreb",
)  # fmt: skip

# a word with the white space behind it; long ones in parts, and one ends where a sentence without spaces does
_PIECE = re.compile(r"[^\s。！？]{1,24}[。！？]*\s*|[。！？]+\s*")
# the end of a sentence or of a paragraph; a line break alone may be in the middle of a sentence
_SENTENCE_END = re.compile(r"(?:[.!?][\"')\]’”»]*\s+|[。！？]+\s*|\n[^\S\n]*\n\s*)$")

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Fact:
    """A code of five digits that a city's archive has."""

    city: str
    code: str

    @property
    def sentence(self) -> str:
        """What the text tells."""
        return f"The access code of the {self.city} archive is {self.code}."

    @property
    def question(self) -> str:
        """What stands behind the text, for the model to continue with :attr:`answer`."""
        return f"\n\nThe access code of the {self.city} archive is"

    @property
    def answer(self) -> str:
        """The right continuation."""
        return f" {self.code}"


@dataclass(frozen=True, slots=True)
class Question:
    """Token ids of a question, behind its context's prefix, and of the right answer."""

    suffix: list[int]
    answer: list[int]


@dataclass(frozen=True, slots=True)
class Context:
    """A long text and its questions, one for each depth in the order of the depths.

    Args:
        length: tokens asked for; prefix, suffix and answer together have as many or a few less.
        prefix: token ids that all questions begin with.
        questions: what follows them.
    """

    length: int
    prefix: list[int]
    questions: list[Question]


@dataclass(frozen=True, slots=True)
class Haystack:
    """A text cut into words, and the words that begin a sentence."""

    pieces: tuple[str, ...]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, text: str) -> Haystack:
        """Cut a text, in which there are other characters than white space."""
        pieces = tuple(_PIECE.findall(text.strip() + "\n\n"))
        return cls.of_pieces(pieces)

    @classmethod
    def of_pieces(cls, pieces: tuple[str, ...]) -> Haystack:
        """The same of a text that is cut already."""
        ends = (i + 1 for i, piece in enumerate(pieces) if _SENTENCE_END.search(piece))
        return cls(pieces, (0, *(end for end in ends if end < len(pieces))))

    def rotated(self, share: float) -> Haystack:
        """The text from the sentence nearest to a share of it, 0 to 1, around to where that begins."""
        start = _nearest(self.starts, share * len(self.pieces))
        return Haystack.of_pieces(self.pieces[start:] + self.pieces[:start])

    def tell(self, count: int, facts: Sequence[Fact], depths: Sequence[float]) -> str:
        """The first ``count`` words, each fact before the sentence that begins nearest to its depth, 0 to 1."""
        starts = self.starts[: max(1, bisect_right(self.starts, count))]
        places = sorted((_nearest(starts, depth * count), i) for i, depth in enumerate(depths))
        told, done = [], 0
        for place, i in places:
            told += [*self.pieces[done:place], facts[i].sentence, " "]
            done = place
        return "".join([*told, *self.pieces[done:count]]).rstrip()


def draw_facts(count: int, seed: int, length: int, repetition: int) -> list[Fact]:
    """Facts of different cities with different codes."""
    generator = random.Random(f"{seed}/{length}/{repetition}")
    cities, codes = generator.sample(CITIES, count), generator.sample(range(10_000, 100_000), count)
    return [Fact(city, str(code)) for city, code in zip(cities, codes, strict=True)]


def build_contexts(
    tokenize: Tokenize, text: str, lengths: Sequence[int], depths: Sequence[float], needles: int, seed: int
) -> list[Context]:
    """All contexts: ``needles`` for each length, from different parts of the text.

    Args:
        tokenize: of the model, with what it puts before a text (BOS).
        text: the haystack.
        lengths: tokens of a context with its longest question and answer.
        depths: where the facts stand, 0 at the beginning, 1 at the end of the text.
        needles: contexts of each length, and so facts at each depth.
        seed: of cities and codes.

    Raises:
        KurtailError: the text is shorter than a context, or a context shorter than its facts.
    """
    haystack = Haystack.of(text)
    return [
        _fill(tokenize, haystack.rotated(i / needles), length, depths, draw_facts(len(depths), seed, length, i))
        for length in lengths
        for i in range(needles)
    ]


def _fill(
    tokenize: Tokenize, haystack: Haystack, length: int, depths: Sequence[float], facts: Sequence[Fact]
) -> Context:
    """The context with as many words as there is room for."""
    longest = max(facts, key=lambda fact: len(tokenize(fact.question + fact.answer)))

    def size(count: int, asked: Sequence[Fact] = (longest,)) -> int:
        told = haystack.tell(count, facts, depths)
        return max(len(tokenize(told + fact.question + fact.answer)) for fact in asked)

    if (least := size(0)) > length:
        raise KurtailError(
            f"{len(facts)} facts and a question take {least} tokens, which a context of {length} has no room for: give "
            "larger --retrieval-lengths or fewer --retrieval-depths"
        )
    every = len(haystack.pieces)
    high = min(length, every)
    while high < every and size(high) <= length:
        high = min(2 * high, every)
    if high == every and (most := size(every)) < length:
        raise KurtailError(
            f"the whole text with the facts has {most} tokens, but --retrieval-lengths asks for {length}: give a longer "
            "--retrieval-text or smaller lengths"
        )
    count = bisect_right(range(1, high + 1), length, key=size)
    # another question may be longer behind the text than by itself
    while count and size(count, facts) > length:
        count -= 1
    return _context(tokenize, haystack.tell(count, facts, depths), length, facts)


def _context(tokenize: Tokenize, told: str, length: int, facts: Sequence[Fact]) -> Context:
    prompts = [tokenize(told + fact.question) for fact in facts]
    # the runtime must be left something to compute behind the prefix
    shared = min(len(os.path.commonprefix(prompts)), *(len(prompt) - 1 for prompt in prompts))
    answers = [
        tokenize(told + fact.question + fact.answer)[len(prompt) :] for fact, prompt in zip(facts, prompts, strict=True)
    ]
    questions = [Question(prompt[shared:], answer) for prompt, answer in zip(prompts, answers, strict=True)]
    return Context(length, prompts[0][:shared], questions)


def _nearest(starts: Sequence[int], place: float) -> int:
    return min(starts, key=lambda start: abs(start - place))
