#!/usr/bin/env bash
# litellm 1.108.7 (PyPI)
# Behaviour: an upstream stream that ends in the middle of the answer, without finish_reason and without
# [DONE], is passed on as a finished one: litellm adds a last chunk with finish_reason "stop". Through the
# proxy the same happens, with [DONE].
# OpenAI documents finish_reason as the reason why the model stopped; litellm promises OpenAI's format.
# Here: agents/llm reports a stream without finish_reason as broken off and retries it. Behind litellm it
# cannot: the part is recorded as the answer (docs/how-to/connect-a-model.md).
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
        for text in ("The depot", " is"):
            choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": None}
            chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
            self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
threading.Thread(target=server.serve_forever, daemon=True).start()
stream = litellm.completion(
    "openai/m",
    [{"role": "user", "content": "Is it open?"}],
    api_base=f"http://127.0.0.1:{server.server_port}/v1",
    api_key="none",
    stream=True,
    num_retries=0,
)
choices = [chunk.choices[0] for chunk in stream]
text = "".join(choice.delta.content or "" for choice in choices)
reasons = [choice.finish_reason for choice in choices if choice.finish_reason]
print(f"text {text!r}, finish reasons {reasons}; the upstream sent none")
assert (text, reasons) == ("The depot is", ["stop"])
PYTHON
