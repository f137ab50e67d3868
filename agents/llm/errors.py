"""The errors of model calls: the one place that judges what an endpoint reports.

Servers of the OpenAI protocol agree on little but the status: codes are names, numbers or absent, and
the reason is often in the text alone. docs/model-servers.md shows what each of them gets.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

logger = logging.getLogger(__name__)

MAX_RETRY_AFTER_SECONDS = 15 * 60
UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
# Of the text of an error, as far as it is searched: a body may have megabytes.
SEARCHED_CHARACTERS = 4000


class LLMError(Exception):
    """A call without an answer. The message is safe to show to users.

    `permanent`: a retry cannot succeed. `retry_after`: seconds that the endpoint requested. `code`:
    stable, for grouping.
    """

    # Of an input that is too long, the part that the model takes; None if the endpoint does not say.
    acceptable_part: float | None = None

    def __init__(
        self, message: str, *, code: str, permanent: bool, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.permanent = permanent
        self.retry_after = retry_after


@dataclass(frozen=True)
class ErrorKind:
    """The meaning of an error. `{model}` in the message is replaced by the model's name."""

    code: str
    permanent: bool
    message: str

    def error(self, model: str = "", retry_after: float | None = None) -> LLMError:
        return LLMError(
            self.message.replace("{model}", repr(model)),
            code=self.code,
            permanent=self.permanent,
            retry_after=retry_after,
        )


TOO_LONG = ErrorKind("too_long", True, "The conversation is too long for the model.")
FILTERED = ErrorKind("content_filter", True, "The model's content filter stopped the answer.")
QUOTA = ErrorKind("quota", True, "The server's model quota is used up.")
RATE_LIMITED = ErrorKind("rate_limited", False, "The model is overloaded.")
KEY_REFUSED = ErrorKind("key_refused", True, "The model refused the server's key.")
UNKNOWN_MODEL = ErrorKind("unknown_model", True, "The model {model} does not exist.")
UNKNOWN_PATH = ErrorKind(
    "unknown_path", True, "The model's server has no such path. Does OPENAI_BASE_URL end in /v1?"
)
WEB_PAGE = ErrorKind(
    "not_an_api",
    True,
    "The model's address answered with a web page. Does OPENAI_BASE_URL lead to the API?",
)
REDIRECTED = ErrorKind(
    "redirected",
    True,
    "The model's server redirects to another address. Set OPENAI_BASE_URL to that one.",
)
UNAVAILABLE = ErrorKind("unavailable", False, "The model is not available.")
REFUSED = ErrorKind("refused", True, "The model refused the request.")
BROKEN = ErrorKind("broken", False, "The model broke off its answer.")
UNREADABLE = ErrorKind("unreadable", False, "The model's answer could not be read.")
EMPTY = ErrorKind("empty", False, "The model gave an empty answer.")
OUTPUT_LIMIT = ErrorKind(
    "output_limit", True, "The model used up its output limit before it answered."
)


@dataclass(frozen=True)
class ErrorReport:
    """An error as an endpoint reports it. `status` is 0 if only the body has one, or none."""

    status: int = 0
    code: str = ""
    type: str = ""
    param: str = ""
    message: str = ""

    @classmethod
    def of(cls, body: Any, status: int = 0) -> "ErrorReport":
        """Read the body of an error: an object under `error`, a text there, or another shape."""
        if isinstance(body, list) and body:
            body = body[0]
        if not isinstance(body, dict):
            return cls(status=status, message=_text(body))
        error = body.get("error") or body
        if not isinstance(error, dict):
            error = {**body, "message": error}
        code = _text(error.get("code"))
        return cls(
            status=status or _status(code) or _status(error.get("status")),
            code=code,
            type=_text(error.get("type") or error.get("status")),
            param=_text(error.get("param")),
            message=" ".join(
                _text(error.get(name))
                for name in ("message", "detail", "title", "metadata", "innererror")
                if error.get(name)
            ),
        )

    @property
    def names(self) -> set[str]:
        return {self.code.lower(), self.type.lower()} - {""}


def _text(value: Any) -> str:
    return "" if value is None else str(value)[:SEARCHED_CHARACTERS]


def _status(value: Any) -> int:
    text = _text(value)
    return int(text) if re.fullmatch("[45][0-9][0-9]", text, re.ASCII) else 0


@dataclass(frozen=True)
class ErrorPattern:
    """Names and words by which an error is recognised, on these statuses. 0 stands for none."""

    kind: ErrorKind
    names: frozenset[str] = frozenset()
    words: re.Pattern[str] | None = None
    statuses: frozenset[int] = frozenset()

    def matches(self, report: ErrorReport) -> bool:
        if report.names & self.names:
            return True
        if self.words is None or (self.statuses and report.status not in self.statuses):
            return False
        return bool(self.words.search(f"{report.code} {report.type} {report.message}"))


def _words(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns), re.IGNORECASE)


_REFUSALS = frozenset({0, 400, 403, 404, 405, 409, 413, 422})
# By name and text, the most certain first; then by status.
PATTERNS = (
    ErrorPattern(
        TOO_LONG,
        frozenset({"context_length_exceeded", "exceed_context_size_error", "context_too_long"}),
        _words(
            r"context.?window.?exceeded",
            r"(maximum|max|model'?s?|available) (model |total |input )?context",
            r"exceed\w* .{0,40}context",
            r"context.?(length|size|window|limit).{0,30}(exceed|overflow)",
            r"(prompt|input|message|conversation|request)s? (is|are|was) too (long|large)",
            r"(prompt|input).{0,60}too (long|large) for",
            r"(input|prompt) (token count|length|tokens).{0,40}exceed",
            r"reduce (the |your )?(length|size) of (the |your )?(input|message|prompt)",
            r"longer than the (maximum|model|context)",
            r"max_new_tokens.{0,5} must be <=",
            r"context.{0,20}token limit",
        ),
        _REFUSALS | {500},
    ),
    ErrorPattern(
        FILTERED,
        frozenset(
            {
                "content_filter",
                "content_policy_violation",
                "contentpolicyviolationerror",
                "data_inspection_failed",
                "moderation_blocked",
            }
        ),
        _words(
            r"content.{0,12}(management )?polic(y|ies)",
            r"content.?filter",
            r"flagged (by|for|as)",
            r"moderation",
        ),
        _REFUSALS,
    ),
    ErrorPattern(
        QUOTA,
        frozenset(
            {
                "insufficient_quota",
                "insufficient_balance",
                "billing_hard_limit_reached",
                "billing_not_active",
                "budget_exceeded",
            }
        ),
        _words(
            r"insufficient.{0,10}(credit|balance|fund|quota)",
            r"(credit )?balance is too low",
            r"budget has been exceeded",
            r"exceeded (its|their|your) (spend|budget|credit)",
        ),
    ),
    ErrorPattern(
        RATE_LIMITED,
        frozenset({"rate_limit_exceeded", "rate_limit_error", "resource_exhausted"}),
        _words(r"rate.?limit", r"too many requests"),
        frozenset({0}),
    ),
    ErrorPattern(
        UNKNOWN_MODEL,
        frozenset({"model_not_found", "deploymentnotfound", "model_not_supported"}),
        _words(
            r"(invalid|unknown|unsupported|no such) model",
            r"not a valid model",
            r"model.{0,120}(not (exist|found|available|served|loaded)|unknown)",
            r"model [^ ]{1,100} (is )?not supported",
            r"no models? (is |are )?loaded",
            r"deployment.{0,40}not (exist|found)",
            r"(no endpoints|no deployments|no provider).{0,20} for",
        ),
        _REFUSALS - {409, 413},
    ),
    ErrorPattern(
        KEY_REFUSED,
        frozenset(
            {
                "invalid_api_key",
                "authentication_error",
                "authenticationerror",
                "auth_error",
                "permission_error",
                "permission_denied",
                "unauthenticated",
                "no_db_connection",
                "token_not_found_in_db",
                "expired_key",
            }
        ),
        _words(
            r"(invalid|incorrect|missing|no|expired) api.?key",
            r"api.?key.{0,20}(not valid|invalid|missing|required)",
        ),
        _REFUSALS,
    ),
)
# The status that a type stands for, in an error without one.
TYPES = {
    "invalid_request_error": 400,
    "invalidrequesterror": 400,
    "badrequesterror": 400,
    "invalid_argument": 400,
    "not_found_error": 404,
    "notfounderror": 404,
    "overloaded_error": 503,
    "server_error": 500,
    "api_error": 500,
    "internal_server_error": 500,
    "internalservererror": 500,
    "timeout_error": 504,
    "unavailable": 503,
}


def judge(report: ErrorReport) -> ErrorKind:
    """Return what an error means; that of an unknown one in an answer is `BROKEN`."""
    for pattern in PATTERNS:
        if pattern.matches(report):
            return pattern.kind
    status = report.status or next((TYPES[name] for name in report.names if name in TYPES), 0)
    return _by_status(status, report)


_BY_STATUS = {
    0: BROKEN,
    401: KEY_REFUSED,
    402: QUOTA,
    403: KEY_REFUSED,
    405: UNKNOWN_PATH,
    408: UNAVAILABLE,
    409: UNAVAILABLE,
    413: TOO_LONG,
    425: UNAVAILABLE,
    429: RATE_LIMITED,
}


def _by_status(status: int, report: ErrorReport) -> ErrorKind:
    if status == 404:
        about_model = re.search("model|deployment", f"{report.param} {report.message}", re.I)
        return UNKNOWN_MODEL if about_model else UNKNOWN_PATH
    if 300 <= status < 400:
        return REDIRECTED
    if status >= 500:
        return UNAVAILABLE
    return _BY_STATUS.get(status, REFUSED)


def from_status(report: ErrorReport, model: str, headers: Mapping[str, str]) -> LLMError:
    """Convert an answer with an error status. Its own text is not shown, as it may quote the key."""
    _log(report, headers.get("x-request-id", ""))
    kind = judge(report)
    permanent = {"true": False, "false": True}.get(headers.get("x-should-retry", "").lower())
    error = kind.error(model, requested_pause(headers))
    error.acceptable_part = _acceptable_part(report) if kind is TOO_LONG else None
    if permanent is not None and kind in (RATE_LIMITED, UNAVAILABLE, REFUSED):
        error.permanent = permanent
    return error


def from_answer(report: ErrorReport, model: str) -> LLMError:
    """Convert an error that came in an answer of status 200."""
    _log(report, "")
    kind = judge(report)
    error = kind.error(model)
    error.acceptable_part = _acceptable_part(report) if kind is TOO_LONG else None
    return error


def _acceptable_part(report: ErrorReport) -> float | None:
    """Return the context of the model in proportion to the input, by the numbers in the error: the
    smallest context and the largest number of all. None where it says `at least` how long the input is:
    vLLM stops to count above the limit."""
    if re.search(r"\bat least [0-9]", report.message):
        return None
    numbers = [int(each) for each in re.findall(r"\b[0-9]{2,9}\b", report.message)]
    limits = [
        int(each)
        for each in re.findall(
            r"context.{0,20}?(?:length|size|window|limit)?[^0-9]{0,20}?([0-9]{2,9})\b",
            report.message,
            re.IGNORECASE,
        )
    ]
    if not limits or max(numbers) <= min(limits):
        return None
    return min(limits) / max(numbers)


def _log(report: ErrorReport, request: str) -> None:
    logger.warning(
        "Model endpoint answered %s (code %s, type %s, request %s)",
        report.status or "an error within its answer",
        *(UNSTORABLE.sub("", value)[:100] or None for value in (report.code, report.type, request)),
    )


def requested_pause(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that an endpoint asks to wait: `retry-after-ms`, else `Retry-After`."""
    try:
        return retry_after(str(float(headers.get("retry-after-ms", "")) / 1000))
    except ValueError:
        return retry_after(headers.get("retry-after", ""))


def retry_after(value: str) -> float | None:
    """Parse a `Retry-After` header, a number of seconds or a date (RFC 9110, 10.2.3). None where it is
    absent or invalid; at most fifteen minutes."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except (ValueError, OverflowError):
            return None
        if date.tzinfo is None:
            date = date.replace(tzinfo=UTC)
        seconds = (date - datetime.now(UTC)).total_seconds()
    if not seconds > 0:  # NaN too
        return None
    return min(seconds, MAX_RETRY_AFTER_SECONDS)
