import re

from rest_framework import authentication
from rest_framework.authentication import BaseAuthentication
from rest_framework.exceptions import (
    APIException,
    AuthenticationFailed,
    NotFound,
    PermissionDenied,
)
from rest_framework.request import Request

from realm import tokens
from realm.models import User

# RFC 6750, section 2.1; any number of blanks before the token.
BEARER = re.compile("(?i:bearer) +([A-Za-z0-9._~+/-]+=*)")
CHALLENGE = 'Bearer realm="realm-server"'
EXPECTED = (
    "The Authorization header must be 'Bearer <realm-server JWT>', once. Get a JWT: "
    "POST /_server-session."
)


class RealmTokenAuthentication(BaseAuthentication):
    """`Authorization: Bearer <realm-server JWT>`. A request with any other Authorization header is
    refused: its sender means to be somebody, so it is neither anonymous nor the user of a cookie."""

    unknown_user: type[APIException] = AuthenticationFailed

    def authenticate(self, request: Request) -> tuple[User, tokens.Claims] | None:
        header = request.META.get("HTTP_AUTHORIZATION")
        if header is None:
            return None
        credential = BEARER.fullmatch(header.strip())
        if credential is None:
            raise AuthenticationFailed(EXPECTED)
        try:
            claims = tokens.verify(credential[1])
        except tokens.InvalidToken as error:
            raise AuthenticationFailed(str(error)) from None
        user = User.objects.filter(matrix_user_id=claims.user).first()
        if user is None:
            raise self.unknown_user(
                "The token's user is unknown. Create a session first: POST /_server-session."
            )
        if not user.is_active:
            raise AuthenticationFailed("The token's user is deactivated.")
        try:
            tokens.check_not_revoked(claims, user)
        except tokens.InvalidToken as error:
            raise AuthenticationFailed(str(error)) from None
        return user, claims

    def authenticate_header(self, request: Request) -> str:
        return CHALLENGE


class RealmServerAuthentication(RealmTokenAuthentication):
    """Answers 404 for a valid token of an unknown user, as the realm server specifies."""

    unknown_user = NotFound


class SessionAuthentication(authentication.SessionAuthentication):
    """A session of the admin or the chat page."""

    def enforce_csrf(self, request: Request) -> None:
        try:
            super().enforce_csrf(request)
        except (AttributeError, TypeError):
            # Django reads the token from a form; this JSON has another value in its place.
            raise PermissionDenied("CSRF Failed: CSRF token missing.") from None
