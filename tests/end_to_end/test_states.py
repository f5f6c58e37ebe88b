"""Saved states: a file takes its own, and refuses those of another file, of stock, and of another rotation of the cache."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROMPT = "The weights of a model are stored in blocks of equal length."
HADAMARD = ("--rotation", "hadamard", "--weights", "rtn")
OTHER_FILE = "the state belongs to another file or to other cache settings: it has "
#: Shapes and types of a kurtail file's cache, for files that are not ours.
Q4_0 = ("-ctk", "q4_0", "-ctv", "q4_0")


@pytest.fixture(scope="module")
def file(converted, tiny_spm) -> Path:
    return converted(tiny_spm, *HADAMARD)


@pytest.fixture(scope="module")
def another(converted, tiny_spm) -> Path:
    """Of the same checkpoint, with other rotations."""
    return converted(tiny_spm, *HADAMARD, "--seed", "7")


@pytest.fixture
def complete(program, tmp_path) -> Callable[..., object]:
    """``complete(model, *options)``: llama-completion with the prompt cache ``tmp_path/state``."""

    def run(model: Path, *options: str):
        return program(
            "llama-completion", "-m", model, "-no-cnv", "-p", PROMPT, "-n", "4", "-c", "128", "--temp", "0",
            "--prompt-cache", tmp_path / "state", *options,
        )  # fmt: skip

    return run


def refusal(done) -> str:
    """The runtime's one line of why it does not take a state."""
    assert done.status == 1, (done.status, done.stderr[-2000:])
    lines = [line for line in done.stderr.splitlines() if "kurtail: the state" in line]
    assert len(lines) == 1, done.stderr[-2000:]
    return lines[0]


def test_a_file_takes_its_own_state(complete, file):
    first, second = complete(file), complete(file)
    assert (first.status, second.status) == (0, 0), second.stderr[-2000:]
    assert "session file has exact match for prompt" in second.stderr
    assert second.stdout == first.stdout


def test_the_state_of_a_file_with_other_rotations_is_refused(complete, file, another):
    assert complete(file).status == 0
    assert re.search(OTHER_FILE + r"'rotations [0-9a-f]{12}', this context has 'rotations [0-9a-f]{12}'", refusal(complete(another)))


def test_the_state_of_another_checkpoint_is_refused(complete, converted, with_tokenizer, tiny_spm):
    """Without rotations, too, where nothing else tells two files of the same shapes apart."""
    files = [
        # a cache of 16 bits: scales of keys are folded in for any other
        converted(with_tokenizer("mistral", tiny_spm, 400, seed=seed), "--rotation", "none", "--weights", "rtn", "--kv", "16")
        for seed in (1, 2)
    ]
    assert complete(files[0]).status == 0
    assert re.search(OTHER_FILE + r"'weights [0-9a-f]{12,}', this context has 'weights ", refusal(complete(files[1])))
    assert complete(files[0]).status == 0


def test_the_state_of_an_unrotated_cache_is_refused(complete, file, monkeypatch):
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    assert complete(file).status == 0
    monkeypatch.delenv("LLAMA_ATTN_ROT_DISABLE")
    assert OTHER_FILE + "'K rotated by 0', this context has 'K rotated by 64'" in refusal(complete(file))


def test_stock_and_kurtail_files_refuse_each_others_states(complete, file, tiny_reference, tmp_path):
    assert complete(tiny_reference, *Q4_0).status == 0
    assert "the state does not record its model's rotations" in refusal(complete(file))
    (tmp_path / "state").unlink()
    assert complete(file).status == 0
    assert "the state belongs to a kurtail file, but this model is not one" in refusal(complete(tiny_reference, *Q4_0))


def test_a_file_for_stock_has_states_of_its_own(complete, converted, tiny_spm, tiny_reference):
    """Its V is rotated in the weights."""
    path = converted(tiny_spm, "--target", "stock", *HADAMARD)
    assert complete(path).status == 0
    assert complete(path).status == 0
    assert "the state belongs to a kurtail file, but this model is not one" in refusal(complete(tiny_reference))


def test_states_of_other_models_stay_upstreams(complete, tiny_reference, tmp_path):
    """Architecture, number of streams, cells: as they were before there was a tag."""
    assert complete(tiny_reference, *Q4_0).status == 0
    state = (tmp_path / "state").read_bytes()
    after = state.index(b"llama") + len(b"llama")
    assert state[after : after + 4] == (1).to_bytes(4, "little")
    assert b"rotations" not in state


def test_a_damaged_tag_is_refused(complete, file, tmp_path):
    assert complete(file).status == 0
    state = (tmp_path / "state").read_bytes()
    at = state.index(b"rotations ")
    (tmp_path / "state").write_bytes(state[: at - 4] + b"\xff\xff\xff\x7f" + state[at:])
    assert "the state is damaged: its tag has 2147483647 bytes, more than the limit of 1024" in refusal(complete(file))
    (tmp_path / "state").write_bytes(state[:at] + b"\x1b[2J\n" + state[at + 5 :])
    assert "it has '?[2J?ions " in refusal(complete(file))


def test_slots_take_their_own_files_states_only(serving, post, file, another, tiny_reference, tmp_path):
    slots = tmp_path / "slots"
    slots.mkdir()

    def answer(port: int) -> str:
        return post(port, "/completion", {"prompt": PROMPT, "n_predict": 4, "temperature": 0})[1]["content"]

    def serve(model: Path, *options: str):
        return serving("llama-server", "-m", model, "-c", "128", "-np", "1", "--slot-save-path", f"{slots}/", *options)

    with serve(file) as port:
        before = answer(port)
        assert post(port, "/slots/0?action=save", {"filename": "state"})[0] == 200
        assert post(port, "/slots/0?action=erase", {})[0] == 200
        status, restored = post(port, "/slots/0?action=restore", {"filename": "state"})
        assert status == 200 and restored["n_restored"] > 4
        assert answer(port) == before
    for model, options in ((another, ()), (tiny_reference, Q4_0)):
        with serve(model, *options) as port:
            before = answer(port)
            status, body = post(port, "/slots/0?action=restore", {"filename": "state"})
            assert status == 400 and "Unable to restore slot" in body["error"]["message"]
            # and it answers as it did
            assert answer(port) == before


@pytest.mark.usefixtures("bindings")
def test_copies_in_memory_are_refused_as_files_are(file, another):
    code = (
        "import sys; from llama_cpp import Llama\n"
        "a, b = (Llama(path, n_ctx=128, verbose=False) for path in sys.argv[1:])\n"
        "a.eval([1, 5, 6, 7]); state = a.save_state(); a.reset(); a.load_state(state); print('own', flush=True)\n"
        "try: b.load_state(state)\n"
        "except RuntimeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file), str(another)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["own", "Failed to set llama state data"]
