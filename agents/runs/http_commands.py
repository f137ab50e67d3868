"""HTTP commands: a run is posted to an `https://` address, whose response is the answer of the run.

The body is signed: `X-Botrealm-Signature: t=<seconds>,v1=<hex>` is the HMAC-SHA256 of `<t>.<body>`
with AGENT_WEBHOOK_SECRET. Only hosts of AGENT_WEBHOOK_HOSTS are called, and only at public addresses
(lib/outgoing.py).
"""

import hashlib
import hmac
import logging
import time
from typing import Any

import orjson
from django.conf import settings

from agents.llm import completions
from lib import outgoing

logger = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 256 * 1024
# The keys of the text in a response, in this order.
ANSWER_KEYS = ("reply", "output", "text", "content")


def post(url: str, event: dict[str, Any], *, key: str, options: completions.CallOptions) -> str:
    """Post an event and return the text of the response. `key`: the idempotency key for the receiver.
    Raises `LLMError` and `Stopped`."""
    options.check()
    payload = orjson.dumps(event)
    deadline = min(options.deadline, time.monotonic() + settings.AGENT_WEBHOOK_TIMEOUT_SECONDS)
    try:
        with outgoing.post(
            url,
            payload,
            _headers(payload, key),
            hosts=settings.AGENT_WEBHOOK_HOSTS,
            deadline=deadline,
        ) as response:
            body = outgoing.read(response, limit=MAX_ANSWER_BYTES, check=options.check)
            return _text(response.status, body)
    except outgoing.ForbiddenURL as error:
        raise _refused(str(error), "webhook_forbidden") from None
    except outgoing.ResponseTooLong:
        raise _refused("The service's answer is too long.", "webhook_too_long") from None
    except outgoing.NO_ANSWER as error:
        logger.warning("HTTP command at %s failed: %s", outgoing.host_of(url), type(error).__name__)
        raise completions.LLMError(
            "The service behind this command did not answer.",
            code="webhook_failed",
            permanent=False,
        ) from error


def _text(status: int, body: bytes) -> str:
    if status >= 500 or status in (408, 429):
        raise completions.LLMError(
            "The service behind this command is not available.",
            code="webhook_failed",
            permanent=False,
        )
    if not 200 <= status < 300:
        raise _refused(f"The service behind this command refused ({status}).", "webhook_refused")
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        answer = None
    if isinstance(answer, dict):
        answer = next((answer[key] for key in ANSWER_KEYS if answer.get(key)), None)
    if not isinstance(answer, str) or not answer.strip():
        raise _refused(
            f"The service answered without any of {', '.join(ANSWER_KEYS)}.", "webhook_unreadable"
        )
    return answer.replace("\0", "")


def _headers(payload: bytes, key: str) -> dict[str, str]:
    now = str(int(time.time()))
    secret = settings.AGENT_WEBHOOK_SECRET.encode()
    signature = hmac.new(secret, now.encode() + b"." + payload, hashlib.sha256).hexdigest()
    return {
        "Content-Type": "application/json",
        "Accept": "application/json",
        "Idempotency-Key": key,
        "X-Botrealm-Signature": f"t={now},v1={signature}",
    }


def _refused(message: str, code: str) -> completions.LLMError:
    return completions.LLMError(message, code=code, permanent=True)
