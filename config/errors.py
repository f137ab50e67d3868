"""Error reports to Sentry: with the release, grouped by cause, without secret or private data."""

from collections.abc import Callable, Iterator
from typing import Any

import sentry_sdk
from django.core.exceptions import ImproperlyConfigured

from config.scrub import REMOVED, is_private, shortened

Scrub = Callable[[str], str]

# Transient errors, by name: each is one issue, wherever it occurs.
TRANSIENT = {"OperationalError", "InterfaceError", "ConnectionError", "TimeoutError", "RedisError"}
# Keys that hold messages, parameters or the identity of the caller.
PRIVATE = {"cookies", "data", "query_string", "http.query", "http.fragment", "env", "vars"}
# Prompts and answers are in bodies, in local variables and in requests to a model.
NOTHING: Any = {
    "user_info": False,
    "cookies": {"mode": "off"},
    "http_headers": {"request": {"mode": "off"}},
    "http_bodies": [],
    "url_query_params": {"mode": "off"},
    "graphql": {"document": False, "variables": False},
    "gen_ai": {"inputs": False, "outputs": False},
    "database_query_data": False,
    "queues": False,
    "stack_frame_variables": False,
}


def report_to(dsn: str, *, environment: str, release: str, scrub: Scrub, **options: Any) -> None:
    """Start reporting. Raises `ImproperlyConfigured` for an invalid DSN."""

    def before_send(event: Any, hint: dict[str, Any]) -> Any:
        grouped(event, hint)
        return cleaned(event, scrub)

    try:
        sentry_sdk.init(
            dsn=dsn,
            environment=environment,
            release=release,
            data_collection=NOTHING,
            before_send=before_send,
            before_send_transaction=lambda event, hint: cleaned(event, scrub),
            before_breadcrumb=lambda crumb, hint: cleaned(crumb, scrub),
            **options,
        )
    except sentry_sdk.utils.BadDsn:
        raise ImproperlyConfigured("SENTRY_DSN is not a Sentry DSN.") from None


def grouped(event: Any, hint: dict[str, Any]) -> None:
    """Group by cause; Sentry would group by the place that reports it."""
    for error in _causes((hint.get("exc_info") or (None, None))[1]):
        code = getattr(error, "code", None)
        kinds = [kind.__name__ for kind in type(error).__mro__]
        if isinstance(code, str):
            event.setdefault("tags", {})["error_code"] = code
        if isinstance(code, str) and code != "internal":
            event["fingerprint"] = [kinds[0], code]
            return
        if transient := next((kind for kind in kinds if kind in TRANSIENT), None):
            event["fingerprint"] = [transient, type(error).__module__.partition(".")[0]]
            return


def cleaned(node: Any, scrub: Scrub) -> Any:
    """Return a copy with all texts scrubbed and without private keys."""
    if isinstance(node, str):
        return scrub(shortened(node, scrub))
    if isinstance(node, dict):
        return {
            key: REMOVED if value and is_private(str(key)) else cleaned(value, scrub)
            for key, value in node.items()
            if key not in PRIVATE
        }
    if isinstance(node, list | tuple):
        return [cleaned(each, scrub) for each in node]
    return node


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
