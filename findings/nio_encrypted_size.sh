#!/usr/bin/env bash
# matrix-nio[e2e] 0.26.0 (PyPI)
# Behaviour: in an encrypted room a message takes up to 2.7 times the bytes that its content takes in an
# unencrypted one: nio escapes every character outside of ASCII before it encrypts, and the ciphertext is
# base64. A Chinese text of 15,000 characters (45 kB) fits into an event (65,536 bytes, as the specification
# has it) when it is sent in clear, and becomes an event of 120 kB when it is encrypted.
# The specification asks for UTF-8 JSON and says nothing of escapes.
# Here: botrunner/outgoing/content.py measures each part of a reply as nio encrypts it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'matrix-nio[e2e]==0.26.0'
"$folder/venv/bin/python" - <<'PYTHON'
import json

from nio import Api
from nio.crypto import OutboundGroupSession

content = {"msgtype": "m.text", "body": "\u6587" * 15_000}
event = {"type": "m.room.message", "room_id": "!room:example.org", "content": content}
clear = len(json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode())
session = OutboundGroupSession()
session.mark_as_shared()
encrypted = len(session.encrypt(Api.to_json(event)))
lean = len(session.encrypt(json.dumps(event, ensure_ascii=False, separators=(",", ":"))))
print(f"in clear {clear} bytes, encrypted by nio {encrypted}, encrypted without escapes {lean}")
assert clear < 65_536 < encrypted and encrypted > 1.9 * lean
PYTHON
