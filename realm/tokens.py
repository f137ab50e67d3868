"""Realm-server JWTs: HS256 with `REALM_SECRET_SEED`.

Claims: `user` (Matrix id), `sessionRoom` (optional), `iat`, `exp` (required).
"""

import time
from dataclasses import dataclass

import jwt
from django.conf import settings

from realm.models import MATRIX_USER_ID

MAX_AGE_SECONDS = 7 * 24 * 3600
MAX_LENGTH = 8192
LEEWAY_SECONDS = 30


class InvalidToken(Exception):
    """The token proves nothing; the message is safe to show and says why."""


@dataclass(frozen=True)
class Claims:
    user: str
    session_room: str | None
    expires: float  # seconds since 1970


def issue(user: str, *, session_room: str | None = None, max_age: int = MAX_AGE_SECONDS) -> str:
    """A token for the Matrix id `user`, good for `max_age` seconds (at most seven days)."""
    now = int(time.time())
    claims: dict[str, str | int] = {
        "user": user,
        "iat": now,
        "exp": now + min(max_age, MAX_AGE_SECONDS),
    }
    if session_room:
        claims["sessionRoom"] = session_room
    return jwt.encode(claims, settings.REALM_SECRET_SEED, algorithm="HS256")


def verify(token: str) -> Claims:
    """Raises `InvalidToken`."""
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
    user, room, expires = claims["user"], claims.get("sessionRoom"), claims["exp"]
    if not isinstance(user, str) or not MATRIX_USER_ID.match(user):
        raise InvalidToken("The claim user is not a Matrix id.")
    if room is not None and not isinstance(room, str):
        raise InvalidToken("The claim sessionRoom is not a room id.")
    if not isinstance(expires, int | float):  # PyJWT reads "123" as a number
        raise InvalidToken("The claim exp is not a number.")
    if expires > time.time() + MAX_AGE_SECONDS + LEEWAY_SECONDS:
        raise InvalidToken("The token lives longer than seven days.")
    return Claims(user=user, session_room=room, expires=expires)
