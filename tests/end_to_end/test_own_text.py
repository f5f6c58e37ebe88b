"""Text that a model writes itself: by the runtime, as transformers' model says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kurtail_gguf.convert import own_text
from kurtail_gguf.convert.own_text import write_own_text
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.method.calibration.tokens import SELF_LENGTH, load_tokenizer
from kurtail_gguf.runtime.sampling import Sampler
from kurtail_gguf.runtime.sampling_worker import draw

pytestmark = pytest.mark.usefixtures("bindings")


def _own_text(source, scratch, n_tokens=600, seed=0):
    return write_own_text(source, load_tokenizer(source), 400, n_tokens, seed, scratch, None, NullProgress())


def test_text_is_seeded_and_goes_on_after_an_interruption(tiny_spm, tmp_path, monkeypatch):
    monkeypatch.setattr(own_text, "BATCH", 2)
    ids = _own_text(tiny_spm, tmp_path / "a")
    assert ids.shape == (3, SELF_LENGTH)
    assert ids.dtype == np.int32
    assert (ids[:, 0] == 1).all()
    assert not np.isin(ids[:, 1], load_tokenizer(tiny_spm).all_special_ids).any()
    assert not np.array_equal(ids, _own_text(tiny_spm, tmp_path / "b", seed=1))

    class Interrupted(Sampler):
        def write(self, starts, *rest):
            if len(starts) == 1:  # the second batch
                raise KeyboardInterrupt
            return super().write(starts, *rest)

    monkeypatch.setattr(own_text, "Sampler", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        _own_text(tiny_spm, tmp_path / "c")
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["0000.npy", "model.gguf"]
    monkeypatch.undo()
    monkeypatch.setattr(own_text, "BATCH", 2)
    assert np.array_equal(ids, _own_text(tiny_spm, tmp_path / "c"))


def test_tokens_are_greedy_first_and_then_follow_the_models_distribution(tiny_spm, tiny_reference):
    starts = np.stack([np.full(48, 1), np.arange(10, 58)], 1).astype(np.int32)
    ticks: list[None] = []
    with Sampler(tiny_reference) as sampler:
        ids = torch.from_numpy(sampler.write(starts, 24, 3, [0], lambda: ticks.append(None)).astype(np.int64))
    assert len(ticks) == 22
    assert (ids[:, :2].numpy() == starts).all()
    with torch.no_grad():
        said = AutoModelForCausalLM.from_pretrained(tiny_spm, dtype=torch.float32)(ids).logits.double().log_softmax(-1)
    assert torch.equal(said[:, 1:4].argmax(-1), ids[:, 2:5])
    taken = said[:, 4:-1].gather(-1, ids[:, 5:, None])[..., 0]
    entropy = -(said.exp() * said)[:, 4:-1].sum(-1)
    # the mean surprise of samples is the entropy; 48 · 19 samples leave a few per cent of noise
    assert abs(float(-taken.mean() / entropy.mean()) - 1) < 0.1


def test_draws_are_the_inverse_of_the_distribution():
    probabilities = np.array([[0.5, 0.0, 0.25, 0.25]] * 4)
    with np.errstate(divide="ignore"):
        logits = np.log(probabilities).astype(np.float32)
    points = np.array([0.0, 0.499, 0.5, 0.999])
    assert draw(logits, points).tolist() == [0, 0, 2, 3]
    # the same spread over a large vocabulary
    wide = np.full((4, 1000), -np.inf, np.float32)
    wide[:, [0, 1, 300, 999]] = logits
    assert draw(wide, points).tolist() == [0, 0, 300, 999]
