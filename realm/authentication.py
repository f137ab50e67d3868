from rest_framework import authentication
from rest_framework.authentication import BaseAuthentication, get_authorization_header
from rest_framework.exceptions import (
    APIException,
    AuthenticationFailed,
    NotFound,
    PermissionDenied,
)
from rest_framework.request import Request

from realm import tokens
from realm.models import User


class RealmTokenAuthentication(BaseAuthentication):
    """`Authorization: Bearer <realm-server JWT>`."""

    unknown_user: type[APIException] = AuthenticationFailed

    def authenticate(self, request: Request) -> tuple[User, tokens.Claims] | None:
        scheme, _, token = get_authorization_header(request).strip().partition(b" ")
        if scheme.lower() != b"bearer":
            return None
        try:
            claims = tokens.verify(token.strip().decode("ascii", "replace"))
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
        return 'Bearer realm="realm-server"'


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
