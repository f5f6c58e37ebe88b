"""Writes a checkpoint of random bf16 weights with a large model's layer shapes, as many layers as asked for.

What a conversion takes of memory and time depends on shapes, not on what the weights say. The default is Llama-3-70B's
shape: 1.7 GB a layer, 4.2 GB for embedding and head. One file a layer, a tensor at a time in memory.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_tokenizer import write_tokenizer

SHAPES = {
    "70b": {"hidden": 8192, "ffn": 28672, "heads": 64, "kv_heads": 8, "head_dim": 128, "vocab": 128256},
    "8b": {"hidden": 4096, "ffn": 14336, "heads": 32, "kv_heads": 8, "head_dim": 128, "vocab": 128256},
    "70b/8": {"hidden": 1024, "ffn": 3584, "heads": 8, "kv_heads": 1, "head_dim": 128, "vocab": 16032},
}


def layer_shapes(shape: dict) -> dict:
    """Shape of every tensor of a layer, by its name below model.layers.N."""
    hidden, ffn = shape["hidden"], shape["ffn"]
    q, kv = shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
    return {
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn),
    }  # fmt: skip


def random_tensor(shape: tuple, generator: torch.Generator) -> torch.Tensor:
    """bf16: gains about one, rows of a matrix of about length one."""
    noise = torch.randn(shape, generator=generator)
    return (1 + 0.3 * noise if len(shape) == 1 else noise * shape[-1] ** -0.5).bfloat16()


def write(directory: Path, shape: dict, layers: int, seed: int = 0) -> None:
    """Write the checkpoint; shape as in SHAPES. The vocabulary is a small one, filled up to the shape's size."""
    directory.mkdir(parents=True)
    table, weight_map = (shape["vocab"], shape["hidden"]), {}
    files = [{"model.embed_tokens.weight": table}, {"model.norm.weight": (shape["hidden"],), "lm_head.weight": table}]
    for layer in range(layers):
        files.append({f"model.layers.{layer}.{name}.weight": size for name, size in layer_shapes(shape).items()})
    for number, tensors in enumerate(files):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        content = {key: random_tensor(size, generator) for key, size in tensors.items()}
        save_file(content, directory / name, {"format": "pt"})
        weight_map |= dict.fromkeys(content, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "hidden_size": shape["hidden"], "intermediate_size": shape["ffn"], "num_hidden_layers": layers,
        "num_attention_heads": shape["heads"], "num_key_value_heads": shape["kv_heads"], "head_dim": shape["head_dim"],
        "vocab_size": shape["vocab"], "max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(directory)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="output directory")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES, default="70b")
    parser.add_argument("--vocab", type=int, help="size of the vocabulary (default: the model's)")
    args = parser.parse_args()
    shape = SHAPES[args.shape] | ({"vocab": args.vocab} if args.vocab else {})
    if args.out.exists():
        sys.exit(f"error: {args.out} exists: give another directory")
    write(args.out, shape, args.layers)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"wrote {args.out}: {args.layers} layers, {size / 1e9:.1f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
