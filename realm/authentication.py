from rest_framework.authentication import BaseAuthentication, get_authorization_header
from rest_framework.exceptions import APIException, AuthenticationFailed, NotFound
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
                "The token's user is not registered here. Ask for a session first."
            )
        if not user.is_active:
            raise AuthenticationFailed("The token's user is deactivated.")
        return user, claims

    def authenticate_header(self, request: Request) -> str:
        return 'Bearer realm="realm-server"'


class RealmServerAuthentication(RealmTokenAuthentication):
    """To the realm server a good token of a user that it does not have is something not found."""

    unknown_user = NotFound
