"""llama-server's page in a real browser: one chat."""

from __future__ import annotations

import pytest


def test_a_chat(shown, serving, post, tiny_spm, converted):
    model = converted(tiny_spm, "--rotation", "hadamard", "--weights", "rtn")
    with serving("llama-server", "-m", model, "-c", "512", "-n", "8", "-np", "1") as port:
        address = f"http://127.0.0.1:{port}/"
        post(port, "/tokenize", {"content": ""})  # waits for the model
        if shown.tab.goto(address).status == 404:
            pytest.skip("llama-server was built without its web page: install npm and build again (docs/install.md)")
        question = shown.tab.get_by_placeholder("Type a message")
        question.fill("What is it?")
        question.press("Enter")
        answer = shown.tab.get_by_role("group", name="Assistant message")
        answer.get_by_role("button", name="Regenerate").wait_for(timeout=120_000)  # it is finished
        assert "What is it?" in shown.tab.get_by_role("group", name="User message").inner_text()
        assert "8 tokens" in " ".join(answer.inner_text().split())
    # everything of the page comes from the server
    assert [url for url in shown.asked if not url.startswith((address, "data:", "blob:"))] == []
