"""Take out of a text what nobody may read in a log or an error report.

Nothing secret or private is written there on purpose. This is for what comes in with the message of
somebody else's exception: a driver that quotes the row, a client that quotes the address.
"""

import json
import re
from urllib.parse import quote

REMOVED = "[removed]"
# A value as short or as well known as the built-in password would be found in ordinary words.
SHORTEST = 10
TOKENS = re.compile(
    r"""
    (?P<kept>
        \b(?:Bearer|Basic)\s+
        | \b(?:access_token|refresh_token|api[_-]?key|password|passwd|secret|authorization)
          (?:\\?["'])?\s*[=:]\s*(?:\\?["'])?(?:(?:Bearer|Basic)\s+)?
        | [?&](?:key|token|sig|signature)=             # in the query of a URL
    )
    [^\s"'\\&,;@}\])]+
    # The password of a URL, which may have an @ in it; or its user, who is the secret in a DSN.
    | (?P<user>://(?:[^\s/:@"']*:)?)[^\s/"'\\]+(?=@)
    | \beyJ[\w-]{8,}\.[\w-]{4,}\.[\w-]*            # a JWT
    | \b(?:sk|syt|mct|mat)[-_][\w-]{8,}            # keys of OpenAI's kind, tokens of Synapse and MAS
    | \bwhsec_[\w+/=]{8,}                          # what webhooks are signed with
    | (?<=DETAIL:)(?:[^"\n\\]|\\(?!n))+            # PostgreSQL quotes the row that it refuses
    """,
    re.VERBOSE | re.IGNORECASE,
)
# Most lines have none of these, and to look for them costs a fiftieth of the pattern.
HINTS = (
    "bearer ",
    "basic ",
    "access_token",
    "refresh_token",
    "api_key",
    "api-key",
    "apikey",
    "passw",
    "secret",
    "?key=",
    "&key=",
    "token=",
    "?sig",
    "&sig",
    "authorization",
    "://",
    "eyj",
    "sk-",
    "sk_",
    "syt_",
    "mct_",
    "mat_",
    "whsec_",
    "detail:",
)


class Scrubber:
    """Removes the given secrets, and what looks like one of anybody's."""

    def __init__(self, *secrets: str) -> None:
        self._secrets = {
            spelled
            for secret in secrets
            if len(secret) >= SHORTEST
            for spelled in (secret, json.dumps(secret)[1:-1], quote(secret, safe=""))
        }

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, REMOVED)
        lowered = text.lower()
        if not any(hint in lowered for hint in HINTS):
            return text
        return TOKENS.sub(lambda match: (match["kept"] or match["user"] or "") + REMOVED, text)
