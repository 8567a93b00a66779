"""A Llama of two layers as a GGUF file, written tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import numpy as np

WIDTH, HEADS, KEY_HEADS, LAYERS, HIDDEN = 32, 4, 2, 2, 48
LETTERS = [chr(c) for c in range(ord("!"), ord("~") + 1)]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ġ", *LETTERS, "th", "the"]
MERGES = ["t h", "th e"]


def write(path: Path) -> dict[str, np.ndarray]:
    """Write it; the tensors by their names in the file."""
    import gguf

    g = np.random.default_rng(0)
    head = WIDTH // HEADS
    shapes = {"token_embd": (len(TOKENS), WIDTH)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_q": (WIDTH, WIDTH),
            f"blk.{i}.attn_k": (KEY_HEADS * head, WIDTH),
            f"blk.{i}.attn_v": (KEY_HEADS * head, WIDTH),
            f"blk.{i}.attn_output": (WIDTH, WIDTH),
            f"blk.{i}.ffn_gate": (HIDDEN, WIDTH),
            f"blk.{i}.ffn_up": (HIDDEN, WIDTH),
            f"blk.{i}.ffn_down": (WIDTH, HIDDEN),
        }
    norms = ["output_norm", *(f"blk.{i}.{n}" for i in range(LAYERS) for n in ("attn_norm", "ffn_norm"))]
    tensors = {f"{name}.weight": (g.normal(size=shape) * 0.2).astype(np.float32) for name, shape in shapes.items()}
    tensors |= {f"{name}.weight": g.uniform(0.5, 1.5, WIDTH).astype(np.float32) for name in norms}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors
