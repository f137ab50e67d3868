import io
import json
from typing import Any

import pytest

from config.wsgi import application


@pytest.mark.django_db
@pytest.mark.parametrize("charset", ["utf-8", "hex", "bz2_codec", "rot13", "undefined", "nope"])
def test_a_charset_that_is_none_does_not_break_the_server(charset: str) -> None:
    started: list[str] = []
    environ: dict[str, Any] = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": "/api",
        "QUERY_STRING": "a=%C3%A4",
        "CONTENT_TYPE": f"application/json; charset={charset}",
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "wsgi.input": io.BytesIO(),
        "wsgi.url_scheme": "http",
    }

    body = b"".join(application(environ, lambda status, headers: started.append(status)))

    # The parameter was read: it is refused by its name.
    assert started == ["400 Bad Request"]
    assert json.loads(body)["code"] == "unknown_name"
