"""Reading llama-perplexity's output: formats of the pinned source, endings that are none, progress."""

from __future__ import annotations

import stat
import sys
import textwrap
from pathlib import Path

import pytest

from kurtail_gguf.measure.perplexity import (
    EvaluationError,
    Perplexity,
    Reference,
    check_scored,
    divergence,
    log_probabilities_bytes,
    perplexity,
    reference,
)  # fmt: skip
from kurtail_gguf.runtime import native

HEAD = """\
0.00.268.897 I cmn          init: llama threadpool init, n_threads = 2
0.04.576.304 I perplexity: calculating perplexity over 3 chunks, n_ctx=512, batch_size=2048, n_seq=4
0.16.388.039 I perplexity: 11.79 seconds per pass - ETA 0.08 minutes
"""
PLAIN = HEAD + "[1]12.5619,[2]21.2807,[3]20.0001,\n0.16.611.438 I Final estimate: PPL = 20.0001 +/- 3.13028\n"
DIVERGENCE = """\
0.04.515.176 I kl_divergence: computing over 2 chunks, n_ctx=512, batch_size=2048, n_seq=4
0.23.195.756 I kl_divergence: 18.68 seconds per pass - ETA 0.15 minutes

chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence              Δp RMS            Same top p
   1      13.1429 ±    2.5471       0.04521 ±    0.02138       0.03847 ±    0.00471     5.715 ±  1.081 %    91.765 ±  1.725 %
   2      22.2333 ±    3.2826       0.04885 ±    0.01453       0.03807 ±    0.00313     4.939 ±  0.650 %    89.804 ±  1.341 %

====== Perplexity statistics ======
Mean PPL(Q)                   :  22.233266 ±   3.282551
Mean PPL(base)                :  21.173169 ±   3.093903

====== KL divergence statistics ======
Mean    KLD:   0.038066 ±   0.003134
Maximum KLD:   0.945474

====== Token probability statistics ======
Mean    Δp: -0.603 ± 0.217 %
RMS Δp    :  4.939 ± 0.650 %
Same top p: 89.804 ± 1.341 %
"""
REFUSED = """\
0.00.049.263 E gguf_init_from_reader: tensor 'blk.0.ffn_down.weight' has invalid ggml type 164. should be in [0, 43)
0.00.050.755 E gguf_init_from_reader: failed to read tensor info
0.00.066.868 E llama_perplexity: unable to load model
"""
SHORT = """\
0.02.000.000 E perplexity: you need at least 1024 tokens to evaluate perplexity with a context of 512
0.02.000.001 E perplexity: the data file you provided tokenizes to only 434 tokens
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """``program(script)`` puts a Python script in the place of llama-perplexity."""

    def install(body: str) -> None:
        path = tmp_path / "llama-perplexity"
        path.write_text(f"#!{sys.executable}\nimport sys\n{textwrap.dedent(body)}", encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(native, "executable", lambda name: path)

    return install


def _prints(text: str, status: int = 0) -> str:
    return f"sys.stdout.buffer.write({text.encode()!r})\nsys.stdout.flush()\nsys.exit({status})\n"


MODEL, TEXT = Path("model.gguf"), Path("text.txt")


def test_perplexity_and_its_error(program, recorder):
    program(_prints(PLAIN))
    assert perplexity(MODEL, TEXT, 512, 3, recorder) == Perplexity(20.0001, 3.13028)
    assert recorder.stages == [["perplexity of model.gguf", 3, 3]]


def test_divergence(program, recorder):
    program(_prints(DIVERGENCE))
    opened = Reference(Path("base"), Perplexity(21.0, 3.0), 512)
    measured = divergence(MODEL, opened, TEXT, 2, recorder)
    assert measured.perplexity == Perplexity(22.233266, 3.282551)
    assert (measured.kld_mean, measured.kld_stderr) == (0.038066, 0.003134)
    assert measured.top1_agreement == pytest.approx(0.89804)
    assert recorder.stages == [["divergence of model.gguf", 2, 2]]


def test_output_may_come_in_any_pieces(program, recorder):
    program(f"""
        import time
        for byte in {DIVERGENCE.encode()!r}:
            sys.stdout.buffer.write(bytes([byte]))
            sys.stdout.flush()
    """)
    opened = Reference(Path("base"), Perplexity(21.0, 3.0), 512)
    assert divergence(MODEL, opened, TEXT, 2, recorder).kld_mean == 0.038066
    assert recorder.stages[0][2] == 2


@pytest.mark.parametrize(
    ("output", "status", "told"),
    [
        (REFUSED, 1, "invalid ggml type 164.*unable to load model"),
        (SHORT, 0, "at least 1024 tokens.*only 434 tokens"),
        (HEAD + "[1]nan,[2]nan,[3]nan,\nFinal estimate: PPL = nan +/- nan\n", 0, "computes NaN in chunk 1"),
        (HEAD + "[1]12.0,\n", 0, "no result"),
        ("", 3, "printed nothing"),
        ("ops.cpp:12: GGML_ASSERT(ne0 == ne1) failed\n", -6, "GGML_ASSERT"),
    ],
)
def test_no_result_is_one_line(program, recorder, output, status, told):
    program(_prints(output, status) if status >= 0 else f"print({output!r}, flush=True)\nimport os\nos.abort()\n")
    with pytest.raises(EvaluationError, match=told) as raised:
        perplexity(MODEL, TEXT, 512, 3, recorder)
    assert "\n" not in str(raised.value)
    assert "model.gguf" in str(raised.value)


def test_values_that_are_no_numbers_end_it_at_once(program, recorder):
    program(_prints(HEAD + "[1]12.5619,[2]nan,[3]nan,\n0.16.6 E Unexpected negative standard deviation of log(prob)\n", 0))
    with pytest.raises(EvaluationError, match="m.gguf computes NaN in chunk 2 of the text") as caught:
        perplexity(Path("m.gguf"), Path("t.txt"), 512, None, recorder)
    assert "standard deviation" not in str(caught.value)


def test_options_in_the_environment_do_not_reach_the_program(program, recorder, monkeypatch):
    monkeypatch.setenv("LLAMA_ARG_CACHE_TYPE_K", "f32")
    program("import os\nassert 'LLAMA_ARG_CACHE_TYPE_K' not in os.environ\n" + _prints(PLAIN))
    perplexity(MODEL, TEXT, 512, 3, recorder)


def test_no_cache_type_is_given(program, recorder):
    program("assert not {'-ctk', '-ctv', '-fa'} & set(sys.argv), sys.argv\n" + _prints(PLAIN))
    perplexity(MODEL, TEXT, 512, 3, recorder)


def test_a_cache_type_that_is_asked_for_is_given(program, recorder):
    program("assert sys.argv[-4:] == ['-ctk', 'q8_0', '-ctv', 'q8_0'], sys.argv\n" + _prints(PLAIN))
    perplexity(MODEL, TEXT, 512, 3, recorder, "q8_0")
    program("assert '-ctk q4_0 -ctv q4_0' in ' '.join(sys.argv), sys.argv\n" + _prints(DIVERGENCE))
    divergence(MODEL, Reference(Path("base"), Perplexity(21.0, 3.0), 512), TEXT, 2, recorder, "q4_0")
    assert [name for name, *_ in recorder.stages] == [
        "perplexity of model.gguf (cache q8_0)", "divergence of model.gguf (cache q4_0)",
    ]  # fmt: skip


WRITES_BASE = """
    path = sys.argv[sys.argv.index('--kl-divergence-base') + 1]
    open(path, 'wb').write(bytes({size}))
"""


def test_reference_is_kept_while_open_and_its_size_told(program, recorder):
    size = log_probabilities_bytes(1000, 512, 3)
    program(textwrap.dedent(WRITES_BASE.format(size=size)) + _prints(PLAIN))
    with reference(MODEL, 1000, TEXT, 512, 3, recorder) as opened:
        assert opened.log_probabilities.stat().st_size == size
        assert opened.perplexity == Perplexity(20.0001, 3.13028)
    assert not opened.log_probabilities.exists()
    assert len(recorder.told) == 1 and f"{size / 1e6:.0f} MB" in recorder.told[0]


def test_a_reference_cut_short_by_a_full_disk_is_noticed(program, recorder):
    program(textwrap.dedent(WRITES_BASE.format(size=100)) + _prints(PLAIN))
    with pytest.raises(EvaluationError, match="disk is full"), reference(MODEL, 1000, TEXT, 512, 3, recorder):
        pass


def test_a_reference_too_large_for_the_disk_is_stopped_at_once(program, recorder):
    # a vocabulary no disk has room for; the program would go on for ever
    program(_prints(HEAD, 0).replace("sys.exit(0)", "import time\ntime.sleep(600)"))
    with pytest.raises(EvaluationError, match="TMPDIR"), reference(MODEL, 10**15, TEXT, 512, 3, recorder):
        pass


def test_size_of_the_log_probabilities_by_hand():
    # 2 chunks of 4: one scored token each, 2 floats and 6 uint16 (5 padded to even) for it
    assert log_probabilities_bytes(vocabulary=5, context=4, chunks=2) == 20 + 4 * 8 + 2 * 1 * (8 + 12)


def test_too_few_scored_tokens():
    check_scored(512, 1)
    check_scored(64, None)
    with pytest.raises(EvaluationError, match="--chunks or --context"):
        check_scored(64, 3)
