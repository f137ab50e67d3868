#!/usr/bin/env bash
# xllamacpp 2026.10.11549 (PyPI), which carries llama.cpp's HTTP server
# Behaviour: messages whose order the model's chat template does not allow are refused with status 400 and
# "Unable to generate parser for this template. Automatic parser generation failed". The template's own
# sentence is quoted after that; the template itself works for other orders. The `code` is a number.
# OpenAI's format, which the server promises, has a text or null as `code`.
# Here: agents/runs sends alternating roles only, and agents/llm takes numbers as codes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check xllamacpp==2026.10.11549 gguf==0.19.0 numpy==2.4.6
cd "$folder"
cat >model.py <<'PYTHON'
import gguf
import numpy

# A Llama of one layer and random weights, whose tokens are bytes.
width, inner = 64, 64
plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
moved = iter(range(256, 512))
tokens = [chr(byte if byte in plain else next(moved)) for byte in range(256)] + ["ab", "<end>"]
writer = gguf.GGUFWriter("model.gguf", "llama")
writer.add_block_count(1)
writer.add_context_length(512)
writer.add_embedding_length(width)
writer.add_feed_forward_length(inner)
writer.add_head_count(2)
writer.add_head_count_kv(2)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_rope_dimension_count(width // 2)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("gpt-2")
writer.add_token_list(tokens)
writer.add_token_types([1] * 257 + [3])
writer.add_token_merges(["a b"])
writer.add_eos_token_id(257)
writer.add_chat_template(
    "{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must alternate') }}"
    "{% endif %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
)
random = numpy.random.default_rng(1)


def matrix(rows, columns):
    return random.normal(0, 0.1, (rows, columns)).astype(numpy.float32)


ones = numpy.ones(width, dtype=numpy.float32)
for name, values in {
    "token_embd": matrix(len(tokens), width),
    "output": matrix(len(tokens), width),
    "output_norm": ones,
    "blk.0.attn_norm": ones,
    "blk.0.ffn_norm": ones,
    "blk.0.attn_q": matrix(width, width),
    "blk.0.attn_k": matrix(width, width),
    "blk.0.attn_v": matrix(width, width),
    "blk.0.attn_output": matrix(width, width),
    "blk.0.ffn_gate": matrix(inner, width),
    "blk.0.ffn_up": matrix(inner, width),
    "blk.0.ffn_down": matrix(width, inner),
}.items():
    writer.add_tensor(f"{name}.weight", values)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
PYTHON
cat >ask.py <<'PYTHON'
import json
import urllib.error
import urllib.request

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = "model.gguf"
params.port = 0
params.n_parallel = 1
params.cpuparams.n_threads = 1
params.warmup = False
server = xllamacpp.Server(params)


def ask(*roles):
    messages = [{"role": role, "content": "Hi"} for role in roles]
    body = json.dumps({"messages": messages, "max_tokens": 2}).encode()
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{server.listening_address}/v1/chat/completions", body, headers)
    try:
        return urllib.request.urlopen(request).status, {}
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]


good, _ = ask("user", "assistant", "user")
bad, error = ask("user", "user")
print(f"alternating {good}; user, user {bad}: {error['code']!r} {error['message'][:80]!r}")
assert (good, bad, error["code"]) == (200, 400, 400)
assert error["message"].startswith("Unable to generate parser for this template")
assert "user and assistant must alternate" in error["message"]
PYTHON
venv/bin/python model.py
venv/bin/python ask.py
