"""A tiny model whose answers are known, written as GGUF and as a folder that transformers loads.

It is a Llama with hand-made weights. Each token has a dimension of its own, and the output matrix is a
table of the token that follows each: a Markov chain. Heads of the first layer look for a word anywhere
in the prompt, and shift the table:

    #tool   calls `current_time`, unless the prompt has the result of a tool
    #long   never ends
    #think  reasons first

Only the standard library is used, as the packages of the servers are not installed beside the product.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONTEXT = 2048
WIDTH, HEADS, LAYERS = 320, 5, 4
HEAD = WIDTH // HEADS
# Without effect on the answers, but most of the work: an answer takes long enough to be cancelled.
INNER = 4096
# Heads compare in a dimension that such a base leaves unrotated.
ROPE_BASE = 1e12

END, SYSTEM, USER, ASSISTANT, TOOL = (
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
)
CONTROL = (END, SYSTEM, USER, ASSISTANT, TOOL)
ANSWER = ("The", " depot", " is", " open.")
REASONING = ("Depots", " rarely", " sleep")
ANSWER_TEXT, REASONING_TEXT = "".join(ANSWER), "".join(REASONING)
CALL = ('\n{"name": "', "current_time", '", "arguments": ', "{}", "}\n")
WORDS = (*ANSWER, "<think>", *REASONING, "</think>", "<tool_call>", *CALL, "</tool_call>")
TRIGGERS = ("#tool", "#long", "#think", TOOL)

# The roles alternate, as in the templates of Mistral Small, Gemma and Llama 2.
# For transformers, which otherwise leaves reasoning and calls in the text.
RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": ASSISTANT,
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|end\|>", "content": "text"},
    },
}
TEMPLATE = (Path(__file__).parent / "template.jinja").read_text()


def _bytes() -> list[str]:
    """Return the characters for which byte-level tokenizers write the 256 bytes."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    moved = iter(range(256, 512))
    return [chr(byte if byte in plain else next(moved)) for byte in range(256)]


TOKENS = [*_bytes(), *CONTROL, *(t for t in (*WORDS, *TRIGGERS) if t not in CONTROL)]
NUMBERS = {token: number for number, token in enumerate(TOKENS)}
FEATURES = {trigger: WIDTH - 1 - number for number, trigger in enumerate(TRIGGERS)}


def _chain() -> Iterator[tuple[str, str]]:
    for words in (
        (ASSISTANT, *ANSWER, END),
        ("<think>", *REASONING, "</think>", ANSWER[0]),
        ("<tool_call>", *CALL, "</tool_call>", END),
    ):
        yield from itertools.pairwise(words)


class Matrix:
    """Rows of zeros, written by output and input."""

    def __init__(self, outputs: int, inputs: int) -> None:
        self.shape = (outputs, inputs)
        self.values = array("f", bytes(4 * outputs * inputs))

    def __setitem__(self, at: tuple[int, int], value: float) -> None:
        self.values[at[0] * self.shape[1] + at[1]] = value


def _weights() -> dict[str, Matrix | array[float]]:
    """Return the weights by their names in transformers."""
    identity = Matrix(len(TOKENS), WIDTH)
    for number in range(len(TOKENS)):
        identity[number, number] = 1
    weights: dict[str, Matrix | array[float]] = {"model.embed_tokens": identity}
    for layer in range(LAYERS):
        weights |= _layer(f"model.layers.{layer}.", sees=layer == 0)
    weights["model.norm"] = array("f", [1.0] * WIDTH)
    weights["lm_head"] = _table()
    return weights


def _layer(name: str, *, sees: bool) -> dict[str, Matrix | array[float]]:
    query, key, value, output = (Matrix(WIDTH, WIDTH) for _ in range(4))
    for number, trigger in enumerate(TRIGGERS if sees else ()):
        # Norms multiply a token by the root of the width; a score of 30 outweighs any context.
        scale = math.sqrt(WIDTH)
        compared = (number + 1) * HEAD - 1
        for token in range(len(TOKENS)):
            query[compared, token] = math.sqrt(30 * math.sqrt(HEAD)) / scale
        key[compared, NUMBERS[trigger]] = math.sqrt(30 * math.sqrt(HEAD)) / scale
        value[number * HEAD, NUMBERS[trigger]] = 1 / scale
        output[FEATURES[trigger], number * HEAD] = 1
    return {
        f"{name}input_layernorm": array("f", [1.0] * WIDTH),
        f"{name}self_attn.q_proj": query,
        f"{name}self_attn.k_proj": key,
        f"{name}self_attn.v_proj": value,
        f"{name}self_attn.o_proj": output,
        f"{name}post_attention_layernorm": array("f", [1.0] * WIDTH),
        f"{name}mlp.gate_proj": Matrix(INNER, WIDTH),
        f"{name}mlp.up_proj": Matrix(INNER, WIDTH),
        f"{name}mlp.down_proj": Matrix(WIDTH, INNER),
    }


def _table() -> Matrix:
    table = Matrix(len(TOKENS), WIDTH)
    for token, following in _chain():
        table[NUMBERS[following], NUMBERS[token]] = 6
    # An instruction wins only after the token from which it may lead elsewhere.
    for trigger, token, following in (
        ("#tool", ASSISTANT, "<tool_call>"),
        ("#think", ASSISTANT, "<think>"),
        ("#long", ANSWER[-1], ANSWER[0]),
    ):
        table[NUMBERS[following], NUMBERS[token]] = 3
        table[NUMBERS[following], FEATURES[trigger]] = 4.5
    table[NUMBERS["<tool_call>"], FEATURES[TOOL]] = -6
    return table


def _gguf_name(name: str) -> str:
    for ours, theirs in (
        ("model.layers.", "blk."),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ):
        name = name.replace(ours, theirs)
    return f"{name}.weight"


def write_gguf(path: Path) -> None:
    """Write one file for llama.cpp."""
    fields: dict[str, Any] = {
        "general.architecture": "llama",
        "general.name": path.stem,
        "llama.block_count": LAYERS,
        "llama.context_length": CONTEXT,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": HEAD,
        "llama.rope.freq_base": ROPE_BASE,
        "llama.vocab_size": len(TOKENS),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [_token_type(number) for number in range(len(TOKENS))],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.eos_token_id": NUMBERS[END],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    weights = _weights()
    head = b"GGUF" + struct.pack("<IQQ", 3, len(weights), len(fields))
    for key, value in fields.items():
        head += _gguf_text(key) + _gguf_value(value)
    offset = 0
    for name, weight in weights.items():
        shape = weight.shape if isinstance(weight, Matrix) else (len(weight),)
        values = weight.values if isinstance(weight, Matrix) else weight
        head += _gguf_text(_gguf_name(name)) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}QIQ", *reversed(shape), 0, offset)
        offset += -(-len(values) * 4 // 32) * 32
    with path.open("wb") as file:
        file.write(head + bytes(-len(head) % 32))
        for weight in weights.values():
            values = weight.values if isinstance(weight, Matrix) else weight
            file.write(values.tobytes() + bytes(-len(values) * 4 % 32))


def _token_type(number: int) -> int:
    if number < 256:
        return 1  # normal
    return 3 if TOKENS[number] in CONTROL else 4  # control, defined by the user


def _gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _gguf_value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _gguf_text(value)
    head = struct.pack("<I", 9)
    if value and isinstance(value[0], int):
        return head + struct.pack("<IQ", 5, len(value)) + struct.pack(f"<{len(value)}i", *value)
    return head + struct.pack("<IQ", 8, len(value)) + b"".join(map(_gguf_text, value))


def write_folder(folder: Path) -> None:
    """Write a folder for transformers and vLLM."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_safetensors(folder / "model.safetensors")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    for name, content in (
        ("config.json", _config()),
        ("generation_config.json", {"eos_token_id": NUMBERS[END], "do_sample": False}),
        ("tokenizer.json", _tokenizer()),
        (
            "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": END,
                "model_max_length": CONTEXT,
                "clean_up_tokenization_spaces": False,
                "response_template": RESPONSE,
            },
        ),
    ):
        (folder / name).write_text(json.dumps(content))


def _config() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(TOKENS),
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": CONTEXT,
        "rope_theta": ROPE_BASE,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": NUMBERS[END],
    }


def _tokenizer() -> dict[str, Any]:
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": token in CONTROL,
            }
            for number, token in enumerate(TOKENS)
            if number >= 256
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {t: n for n, t in enumerate(TOKENS[:256])}, "merges": []},
    }


def _write_safetensors(path: Path) -> None:
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    weights = _weights()
    offset = 0
    for name, weight in weights.items():
        shape = weight.shape if isinstance(weight, Matrix) else (len(weight),)
        end = offset + 4 * math.prod(shape)
        head[f"{name}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for weight in weights.values():
            file.write((weight.values if isinstance(weight, Matrix) else weight).tobytes())


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]))
    write_folder(Path(sys.argv[2]))
