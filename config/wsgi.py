import os
from typing import Any

import django
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.handlers.wsgi import WSGIHandler, WSGIRequest

from config import misspelt

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")


class Request(WSGIRequest):
    _encoding: str | None

    def _set_content_type_params(self, meta: dict[str, Any]) -> None:
        """Ignore a charset that is no encoding of text. Django accepts any codec of Python, such as
        "hex" or "undefined", and fails on the query string before its error handling."""
        try:
            super()._set_content_type_params(meta)  # type: ignore[misc]
            "".encode(self._encoding or "utf-8").decode(self._encoding or "utf-8")
        except (LookupError, UnicodeError, TypeError):
            self._encoding = None


class Handler(WSGIHandler):
    request_class = Request


django.setup(set_prefix=False)
if settings.UNUSED_SECRETS:
    raise ImproperlyConfigured(
        f"{' and '.join(settings.UNUSED_SECRETS)}: the web server signs sessions and tokens, so it "
        "needs the real value. `unused` is for workers and the bot runner."
    )
misspelt.log()
application = Handler()
