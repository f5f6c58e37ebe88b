"""Texts from anywhere: every form that is read, and what is said of those that are not."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kurtail_gguf.files.texts import check_text, without_mark
from kurtail_gguf.messages.errors import CalibrationError, KurtailError
from kurtail_gguf.method.calibration.texts import chat_template, check_texts, read_texts, texts_sha256
from kurtail_gguf.method.calibration.tokens import load_tokenizer

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }};{% endfor %}"
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.fixture
def tokenizer(tiny_checkpoint):
    found = load_tokenizer(tiny_checkpoint())
    found.chat_template = TEMPLATE
    return found


def _lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _parquet(path: Path, **columns: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    ("name", "data", "texts"),
    [
        ("a.txt.gz", gzip.compress("eins\nzwei".encode()), ["eins\nzwei"]),
        ("named-wrongly.txt", gzip.compress(b"eins"), ["eins"]),
        ("marked.txt", b"\xef\xbb\xbfeins", ["eins"]),
        ("a.jsonl.gz", gzip.compress(_lines({"text": "eins"}, {"text": "zwei"})), ["eins", "zwei"]),
        ("marked.jsonl", b"\xef\xbb\xbf" + _lines({"text": "eins"}), ["eins"]),
        # types that differ from line to line are nothing to a text
        ("content.jsonl", _lines({"content": "eins", "id": 1}, {"text": None, "content": "zwei", "id": "x"}), ["eins", "zwei"]),
        ("chat.jsonl", _lines({"messages": CHAT}), ["user: hi;assistant: ho;"]),
        ("array.json", json.dumps([{"text": "eins"}, {"text": "zwei"}], indent=1).encode(), ["eins", "zwei"]),
        ("pair.jsonl", rb'{"text": "\ud83d\ude42"}', ["🙂"]),
    ],
)
def test_files_of_rows(tmp_path, tokenizer, name, data, texts):
    (tmp_path / name).write_bytes(data)
    assert list(read_texts((str(tmp_path / name),), chat_template(tokenizer))) == texts


def test_what_datasets_reads(tmp_path, tokenizer):
    import datasets

    flat = _parquet(tmp_path / "a.parquet", text=["eins", "zwei"])
    chats = _parquet(tmp_path / "b.parquet", messages=[CHAT])
    split = tmp_path / "split"
    _parquet(split / "data" / "train-0.parquet", content=["eins"])
    _parquet(split / "data" / "test-0.parquet", content=["not this one"])
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "a.txt").write_text("eins\n\nzwei\n", encoding="utf-8")
    datasets.Dataset.from_dict({"text": ["kept"]}).save_to_disk(tmp_path / "kept")
    for source, texts in (
        (flat, ["eins", "zwei"]),
        (chats, ["user: hi;assistant: ho;"]),
        (split, ["eins"]),
        (plain, ["eins\n\nzwei\n"]),
        (tmp_path / "kept", ["kept"]),
    ):
        assert list(read_texts((str(source),), chat_template(tokenizer))) == texts


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("gone.txt", None, "gone.txt does not exist"),
        ("gone.jsonl", None, "gone.jsonl does not exist"),
        ("gone.parquet", None, "gone.parquet does not exist"),
        ("empty.txt", b" \n", "empty.txt is empty"),
        ("empty.jsonl", b"\n", "empty.jsonl is empty"),
        ("wide.txt", "words".encode("utf-16"), "wide.txt is UTF-16: convert it with iconv -f UTF-16 -t UTF-8"),
        ("wide.jsonl", _lines({"text": "a"}).decode().encode("utf-16"), "wide.jsonl is UTF-16: convert it with iconv"),
        ("latin.txt", b"na\xefve words", "latin.txt is not UTF-8: .* at byte 2"),
        ("model.txt", b"GGUF\x03\x00\x00\x00", "model.txt is a GGUF file; a plain UTF-8 text is needed"),
        ("zeros.txt", b"words\x00words", "zeros.txt is not text: byte 5 is NUL"),
        ("cut.txt.gz", gzip.compress(b"words " * 99)[:-9], "cut.txt.gz is a truncated or damaged gzip file"),
        ("pointer.txt", POINTER, "pointer.txt is a Git LFS pointer.*git lfs pull"),
        ("pointer.jsonl", POINTER, "pointer.jsonl is a Git LFS pointer.*git lfs pull"),
        ("pointer.parquet", POINTER, "pointer.parquet is a Git LFS pointer.*git lfs pull"),
        ("bad.parquet", b"PAR1 and no more", "bad.parquet cannot be read: "),
        ("broken.jsonl", b'{"text": "a"}\n{"text"', r"broken.jsonl:2: not JSON"),
        ("field.jsonl", b'{"body": "a", "id": 1}\n', r"field.jsonl:1: .* text, messages, content; its fields are body, id"),
        ("type.jsonl", b'{"text": 3}\n', r"type.jsonl:1: field 'text' is not a string"),
        ("half.jsonl", b'{"text": "a"}\n{"text": "bc\\ud800d"}\n', r"half.jsonl:2: character 2 .*half a surrogate pair \(\\ud800\)"),
        ("roles.jsonl", b'{"messages": ["hi"]}\n', r"roles.jsonl:1: field 'messages' is not a list of objects with role"),
        ("chat.jsonl", _lines({"messages": CHAT}), r"chat.jsonl:1: the chat .*no chat template.*field 'text'"),
    ],
)
def test_bad_texts_are_named(tmp_path, capfd, name, data, message):
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(CalibrationError, match=message) as caught:
        list(read_texts((str(path),)))
        check_texts((str(path),))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_chat_that_the_template_refuses_is_named_by_its_line(tmp_path, tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    (tmp_path / "a.jsonl").write_bytes(_lines({"text": "a"}, {"messages": CHAT}))
    with pytest.raises(CalibrationError, match=r"a.jsonl:2: .*roles must alternate"):
        list(read_texts((str(tmp_path / "a.jsonl"),), chat_template(tokenizer)))


def test_what_is_no_text_is_refused_before_the_model_is_looked_at(tmp_path):
    from kurtail_gguf.convert.pipeline import convert
    from kurtail_gguf.convert.settings import ConvertConfig
    from kurtail_gguf.messages.progress import NullProgress

    (tmp_path / "t.txt").write_bytes("words".encode("utf-16"))
    with pytest.raises(CalibrationError, match="t.txt is UTF-16"):
        convert(ConvertConfig("no-such-model", tmp_path / "o.gguf", calibration=(str(tmp_path / "t.txt"),)), NullProgress())
    assert [path.name for path in tmp_path.iterdir()] == ["t.txt"]


def test_a_directory_is_another_text_where_a_file_in_it_is(tmp_path):
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    first = texts_sha256(str(tmp_path))
    assert texts_sha256(str(tmp_path)) == first
    (tmp_path / "b.txt").write_text("b", encoding="utf-8")
    assert texts_sha256(str(tmp_path)) != first


@pytest.mark.parametrize("size", [10, (1 << 20) - 1])
def test_a_text_to_measure_on_is_read_to_its_end(tmp_path, size):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * size + "é".encode())  # cut by the piece that is read at a time
    check_text(path, KurtailError)
    path.write_bytes(b"a" * size + "é".encode()[:1])
    with pytest.raises(KurtailError, match=f"a.txt is not UTF-8: unexpected end of data at byte {size}"):
        check_text(path, KurtailError)
    path.write_bytes(gzip.compress(b"words"))
    with pytest.raises(KurtailError, match="a.txt is compressed with gzip: unpack it with gunzip; a plain"):
        check_text(path, KurtailError)


def test_the_mark_of_a_text_is_not_measured(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfwords")
    with without_mark(path) as plain:
        assert plain.read_bytes() == b"words"
    assert not plain.exists() and path.exists()
    path.write_bytes(b"words")
    with without_mark(path) as plain:
        assert plain == path


@pytest.fixture(autouse=True)
def as_it_was():
    """datasets is told to be quiet; other tests may look at its messages."""
    import datasets

    level = datasets.logging.get_verbosity()
    yield
    datasets.logging.set_verbosity(level or logging.WARNING)
