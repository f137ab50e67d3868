#!/usr/bin/env bash
# litellm 1.108.7 (PyPI)
# Behaviour: the text of a refusal, which OpenAI streams as delta.refusal with content null, is not passed
# on: neither content nor refusal has it, and finish_reason is "stop". The client sees an empty answer.
# OpenAI documents delta.refusal for this; litellm promises OpenAI's format.
# Here: agents/llm takes a refusal's text for the answer. Behind litellm there is none, and the run fails
# with the code "empty" (docs/how-to/connect-a-model.md).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check litellm==1.108.7
LITELLM_LOCAL_MODEL_COST_MAP=True "$folder/venv/bin/python" - <<'PYTHON'
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import litellm


class Upstream(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        deltas = [
            {"role": "assistant", "content": None, "refusal": ""},
            {"refusal": "I cannot open"},
            {"refusal": " the depot."},
            {},
        ]
        for delta in deltas:
            choice = {"index": 0, "delta": delta, "finish_reason": None if delta else "stop"}
            chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
            self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
threading.Thread(target=server.serve_forever, daemon=True).start()
stream = litellm.completion(
    "openai/m",
    [{"role": "user", "content": "Open it."}],
    api_base=f"http://127.0.0.1:{server.server_port}/v1",
    api_key="none",
    stream=True,
    num_retries=0,
)
sent = "".join(chunk.model_dump_json() for chunk in stream)
print(f"the text is {'kept' if 'I cannot' in sent else 'lost'}; the chunks: {sent[:400]}")
assert "I cannot" not in sent and "the depot" not in sent and '"stop"' in sent
PYTHON
