"""Workers: messages, results, errors and deaths; checked with workers written by the test."""

from __future__ import annotations

import json
import os
import signal
import textwrap

import pytest

from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.runtime import native, vendored


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """``worker(body)`` makes a worker module; its home stands in for the vendored packages."""
    monkeypatch.setattr(native, "python_dir", lambda: tmp_path)

    def make(body: str) -> str:
        source = f"from kurtail_gguf.runtime import vendored\nfrom kurtail_gguf.messages.errors import KurtailError\n{textwrap.dedent(body)}"
        (tmp_path / "made_worker.py").write_text(source, encoding="utf-8")
        return "made_worker"

    return make


def test_messages_then_result(worker):
    module = worker("""
        def handle(request, send):
            print("a library's chatter")
            for n in range(request["count"]):
                send({"n": n})
            return {"sum": "é"}
        vendored.serve(handle)
    """)
    seen = []
    assert vendored.run(module, {"count": 3}, seen.append) == {"sum": "é"}
    assert seen == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_an_error_is_its_line(worker):
    module = worker("""
        def handle(request, send):
            raise KurtailError("no such\\nthing")
        vendored.serve(handle)
    """)
    with pytest.raises(vendored.WorkerError, match="^no such thing$"):
        vendored.run(module, {})


def test_a_defect_is_told_by_its_last_line(worker):
    module = worker("""
        def handle(request, send):
            {}["missing"]
        vendored.serve(handle)
    """)
    with pytest.raises(vendored.WorkerError, match="status 1: KeyError: 'missing'"):
        vendored.run(module, {})


def test_one_process_answers_many_requests_and_is_started_again_where_it_died(worker):
    module = worker("""
        import os
        def handle(request, send):
            if request.get("wrong"):
                raise KurtailError("no")
            return os.getpid()
        vendored.serve(handle)
    """)
    with vendored.Worker(module) as one:
        first = one.ask({})
        with pytest.raises(vendored.WorkerError, match="^no$"):
            one.ask({"wrong": True})
        assert one.ask({}) == first != os.getpid()
        os.kill(first, signal.SIGKILL)
        os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
        assert one.ask({}) != first


def test_a_killed_worker(worker):
    module = worker("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    with pytest.raises(vendored.WorkerError, match="signal 9: out of memory"):
        vendored.run(module, {})


def test_more_on_standard_error_than_a_pipe_holds(worker):
    module = worker("""
        import sys
        def handle(request, send):
            for _ in range(20000):
                print("x" * 100, file=sys.stderr)
            return 1
        vendored.serve(handle)
    """)
    assert vendored.run(module, {}) == 1


def test_an_interrupted_caller_leaves_no_worker(worker, tmp_path):
    module = worker("""
        import os, pathlib, time
        def handle(request, send):
            send({"pid": os.getpid()})
            time.sleep(600)
        vendored.serve(handle)
    """)
    pids = []

    def interrupt(message):
        pids.append(message["pid"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vendored.run(module, {}, interrupt)
    with pytest.raises(ProcessLookupError):
        __import__("os").kill(pids[0], 0)


def test_another_gguf_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "python_dir", lambda: tmp_path / "elsewhere")
    with pytest.raises(KurtailError, match="was imported from"):
        vendored.assert_vendored(pytest)


@pytest.mark.parametrize("offline", [True, False])
def test_code_beside_a_tokenizer_is_run_by_no_worker_that_reads_checkpoints(worker, tmp_path, monkeypatch, offline):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    # as upstream's converter does for some class names
    module = worker("""
        from transformers import AutoTokenizer
        vendored.serve(lambda request, send: type(AutoTokenizer.from_pretrained(request, trust_remote_code=True)).__name__)
    """)
    model = tmp_path / "model"
    model.mkdir()
    (model / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        "from transformers import PreTrainedTokenizer\n"
        "class Evil(PreTrainedTokenizer):\n"
        "    vocab_size, get_vocab = 0, lambda self: {}\n"
    )
    (model / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    )
    if offline:
        with pytest.raises(vendored.WorkerError, match="code that comes with a checkpoint is not run"):
            vendored.run(module, str(model))
    else:  # it would run
        assert vendored.run(module, str(model), offline=False) == "Evil"
    assert (tmp_path / "ran").exists() != offline
