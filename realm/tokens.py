"""Realm-server JWTs: HS256 with `REALM_SECRET_SEED`.

Claims: `user` (Matrix id), `sessionRoom` (optional), `iat` and `exp` (required, in whole seconds).
"""

import time
from dataclasses import dataclass
from datetime import datetime

import jwt
from django.conf import settings

from realm.models import MATRIX_USER_ID, User

MAX_AGE_SECONDS = 7 * 24 * 3600
MAX_LENGTH = 8192
LEEWAY_SECONDS = 30


class InvalidToken(Exception):
    """The token is not valid; the message has the reason and is safe to show."""


@dataclass(frozen=True)
class Claims:
    user: str
    session_room: str | None
    issued: float  # seconds since 1970, as `expires`
    expires: float


def issue(
    user: str,
    *,
    session_room: str | None = None,
    max_age: int = MAX_AGE_SECONDS,
    valid_from: datetime | None = None,
) -> str:
    """Issue a token for the Matrix id `user`, valid for `max_age` seconds (at most seven days).
    `valid_from`: that of the user, if their tokens were revoked; it may be a second ahead."""
    now = int(time.time())
    if valid_from:
        now = max(now, int(valid_from.timestamp()))
    claims: dict[str, str | int] = {
        "user": user,
        "iat": now,
        "exp": now + min(max_age, MAX_AGE_SECONDS),
    }
    if session_room:
        claims["sessionRoom"] = session_room
    return jwt.encode(claims, settings.REALM_SECRET_SEED, algorithm="HS256")


def verify(token: str) -> Claims:
    """Verify a token, except for its revocation (`check_not_revoked`). Raises `InvalidToken`."""
    if len(token) > MAX_LENGTH:
        raise InvalidToken("The token is too long.")
    try:
        claims = jwt.decode(
            token,
            settings.REALM_SECRET_SEED,
            algorithms=["HS256"],
            options={"require": ["exp", "iat", "user"]},
            leeway=LEEWAY_SECONDS,
        )
    except jwt.ExpiredSignatureError:
        raise InvalidToken("The token has expired.") from None
    except jwt.MissingRequiredClaimError as error:
        raise InvalidToken(f"The token lacks the claim {error.claim}.") from None
    except (jwt.PyJWTError, ValueError, TypeError, OverflowError):
        raise InvalidToken("The token is not valid.") from None
    user, room = claims["user"], claims.get("sessionRoom")
    issued, expires = claims["iat"], claims["exp"]
    if not isinstance(user, str) or not MATRIX_USER_ID.match(user):
        raise InvalidToken("The claim user is not a Matrix id.")
    if room is not None and not isinstance(room, str):
        raise InvalidToken("The claim sessionRoom is not a room id.")
    for name, value in (("iat", issued), ("exp", expires)):
        if not isinstance(value, int | float):  # PyJWT reads "123" as a number
            raise InvalidToken(f"The claim {name} is not a number.")
    if expires > time.time() + MAX_AGE_SECONDS + LEEWAY_SECONDS:
        raise InvalidToken("The token lives longer than seven days.")
    return Claims(user=user, session_room=room, issued=issued, expires=expires)


def check_not_revoked(claims: Claims, user: User) -> None:
    """Raise `InvalidToken` for a revoked token. A leeway would accept one that leaked just before."""
    if user.tokens_valid_from and claims.issued < user.tokens_valid_from.timestamp():
        raise InvalidToken("The token has been revoked. Get a new one: POST /_server-session.")
