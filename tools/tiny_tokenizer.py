"""Trains a SentencePiece vocabulary small enough for a model made in a test."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Trained on a text that stays as it is: what tests measure must not change with our documentation.
TEXT = ROOT / "tests" / "text" / "specification.txt"
#: Pieces, 256 of them bytes.
VOCABULARY = 400


def write_tokenizer(directory: Path, **settings: object) -> None:
    """Write ``tokenizer.model`` and ``tokenizer_config.json``, the latter with ``settings`` added."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=str(TEXT), model_prefix=str(directory / "tokenizer"), vocab_size=VOCABULARY,
        model_type="bpe", byte_fallback=True, num_threads=1, minloglevel=2,
    )  # fmt: skip
    config = {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(config | settings), encoding="utf-8")
