#!/usr/bin/env bash
# openai 3.57.0 (PyPI)
# Behaviour: an answer 429 with `Retry-After: 1` is retried (twice by default), one with `Retry-After: 130`
# not at all: the error is raised at once, without a hint that nothing was retried.
# The README promises two retries of 429 by default, with a short exponential backoff.
# Here: agents/llm/transport.py turns the SDK's retries off; a run waits in the database for as long as
# the endpoint requests, up to 15 minutes (agents/llm/completions.py:retry_after).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check openai==3.57.0
"$folder/venv/bin/python" - <<'PYTHON'
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai

calls = {}


class Endpoint(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        seconds = self.path.split("/")[1]
        calls[seconds] = calls.get(seconds, 0) + 1
        body = b'{"error": {"message": "Slow down.", "type": "requests", "code": "rate_limit_exceeded"}}'
        self.send_response(429)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.send_header("retry-after", seconds)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
threading.Thread(target=server.serve_forever, daemon=True).start()
for seconds in ("1", "130"):
    client = openai.OpenAI(api_key="none", base_url=f"http://127.0.0.1:{server.server_port}/{seconds}/v1")
    try:
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}])
    except openai.RateLimitError:
        print(f"Retry-After: {seconds}: {calls[seconds]} calls")
assert calls == {"1": 3, "130": 1}
PYTHON
