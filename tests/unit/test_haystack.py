"""Prompts of the retrieval test: where facts stand, how long contexts are, what is drawn; with a vocabulary of the test's own."""

from __future__ import annotations

import re

import pytest

from kurtail_gguf.measure.haystack import CITIES, Context, Haystack, build_contexts, draw_facts
from kurtail_gguf.messages.errors import KurtailError

SENTENCES = [f"Sentence {i} says that {'very ' * (i % 7)}little happened in the year {1000 + i}." for i in range(900)]
#: A sentence's end that is none: paragraphs are broken into lines.
TEXT = "\n\n".join("\n".join(SENTENCES[i : i + 5]) for i in range(0, 900, 5))
DEPTHS = (0.1, 0.5, 0.9)


class Vocabulary:
    """A token a word, a mark or a digit, as if BOS stood before every text."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {"<s>": 0}
        self.words = ["<s>"]

    def __call__(self, text: str) -> list[int]:
        found = re.findall(r"\d|\n+|[^\W\d]+|[^\w\s]", text)
        for word in found:
            if word not in self.numbers:
                self.numbers[word] = len(self.words)
                self.words.append(word)
        return [0, *(self.numbers[word] for word in found)]

    def text(self, tokens: list[int]) -> str:
        """The words, with blanks between them."""
        return " ".join(self.words[token] for token in tokens)


@pytest.fixture
def vocabulary() -> Vocabulary:
    return Vocabulary()


def _told(city: str, code: str) -> str:
    return f"The access code of the {city} archive is {' '.join(code)} ."


def test_a_context_has_the_length_and_every_fact_at_its_depth(vocabulary):
    contexts = build_contexts(vocabulary, TEXT, (300, 1000), DEPTHS, needles=3, seed=5)
    assert [context.length for context in contexts] == [300] * 3 + [1000] * 3
    for i, context in enumerate(contexts):
        facts = draw_facts(3, 5, context.length, i % 3)
        sizes = [len(context.prefix) + len(one.suffix) + len(one.answer) for one in context.questions]
        assert context.length - 4 <= max(sizes) <= context.length
        text = vocabulary.text(context.prefix)
        for fact, depth, one in zip(facts, DEPTHS, context.questions, strict=True):
            sentence = _told(fact.city, fact.code)
            before, found, after = text.partition(sentence)
            assert found and sentence not in after
            # a depth is one of the text's own words; a sentence has up to 20 tokens, and the facts have 14 each
            assert abs(len(vocabulary(before)) / len(context.prefix) - depth) < 35 / context.length
            assert before == "<s> " or re.search(r"\. (\n+ )?$", before), before[-40:]
            assert after.startswith((" Sentence", " The access code"))
            asked = vocabulary.text([*context.prefix, *one.suffix])
            assert asked.endswith(f"\n\n The access code of the {fact.city} archive is")
            assert vocabulary.text(one.answer) == " ".join(fact.code)


def test_a_fact_stands_at_both_ends_if_asked(vocabulary):
    (context,) = build_contexts(vocabulary, TEXT, (200,), (0.0, 1.0), needles=1, seed=0)
    first, last = draw_facts(2, 0, 200, 0)
    text = vocabulary.text(context.prefix)
    assert text.startswith(f"<s> {_told(first.city, first.code)} Sentence")
    behind = text.partition(_told(last.city, last.code))[2].partition("\n\n The access")[0]
    # at most the sentence that was cut off
    assert len(behind.split()) < 25 and ". Sentence" not in behind


def test_line_breaks_end_no_sentence_and_paragraphs_do():
    haystack = Haystack.of("One two\nthree. Four five\n\nSix 3.5 seven!\nEight")
    assert [haystack.pieces[start].strip() for start in haystack.starts] == ["One", "Four", "Six", "Eight"]
    haystack = Haystack.of("一二三。四五六！七")
    assert [haystack.pieces[start].strip() for start in haystack.starts] == ["一二三。", "四五六！", "七"]
    assert "".join(Haystack.of(TEXT).pieces).strip() == TEXT


def test_the_text_begins_at_another_sentence_each_time(vocabulary):
    contexts = build_contexts(vocabulary, TEXT, (200,), (0.5,), needles=4, seed=0)
    begun = [vocabulary.text(context.prefix[:8]) for context in contexts]
    assert begun[0] == "<s> Sentence 0 says that little happened in"
    numbers = [int("".join(re.findall(r"\d", beginning))) for beginning in begun]
    assert numbers == pytest.approx([0, 225, 450, 675], abs=5)
    assert all(beginning.startswith("<s> Sentence ") for beginning in begun)


def test_a_text_that_ends_goes_on_from_its_beginning(vocabulary):
    whole = len(vocabulary(TEXT))
    contexts = build_contexts(vocabulary, TEXT, (whole - 100,), (0.5,), needles=2, seed=0)
    text = vocabulary.text(contexts[1].prefix)
    assert "Sentence 8 9 9 " in text.partition("Sentence 0 ")[0] and "Sentence 1 2 0 " in text.partition("Sentence 0 ")[2]


def test_facts_depend_on_seed_length_and_repetition():
    drawn = draw_facts(20, 1, 1024, 0)
    assert drawn == draw_facts(20, 1, 1024, 0)
    assert len({fact.city for fact in drawn}) == len({fact.code for fact in drawn}) == 20
    assert all(re.fullmatch(r"[1-9]\d{4}", fact.code) for fact in drawn)
    assert all(drawn != draw_facts(20, *other) for other in ((2, 1024, 0), (1, 2048, 0), (1, 1024, 1)))
    assert len(set(CITIES)) == len(CITIES)


def test_the_same_is_built_again(vocabulary):
    def built(seed: int) -> list[Context]:
        return build_contexts(vocabulary, TEXT, (200,), DEPTHS, 2, seed)

    assert built(3) == built(3) != built(4)


def test_texts_and_contexts_that_are_too_short_are_named(vocabulary):
    with pytest.raises(KurtailError, match=r"the whole text with the facts has \d+ tokens, .* asks for 4000: give a longer"):
        build_contexts(vocabulary, " ".join(SENTENCES[:100]), (100, 4000), DEPTHS, 1, 0)
    with pytest.raises(KurtailError, match=r"3 facts and a question take \d+ tokens, which a context of 40 has no room"):
        build_contexts(vocabulary, TEXT, (40,), DEPTHS, 1, 0)


def test_one_question_leaves_something_to_compute(vocabulary):
    (context,) = build_contexts(vocabulary, TEXT, (100,), (0.5,), 1, 0)
    assert len(context.questions[0].suffix) == 1


def test_a_longer_question_than_by_itself_still_fits():
    """A vocabulary that splits the second city only behind a text."""
    plain = Vocabulary()
    second = draw_facts(2, 0, 200, 0)[1].city

    def tokenize(text: str) -> list[int]:
        tokens = plain(text)
        split = "Sentence" in text and f"\n\nThe access code of the {second}" in text
        return [*tokens[:1], 0, 0, 0, 0, *tokens[1:]] if split else tokens

    (context,) = build_contexts(tokenize, TEXT, (200,), (0.2, 0.8), 1, 0)
    assert max(len(context.prefix) + len(one.suffix) + len(one.answer) for one in context.questions) <= 200
