"""The realm server's HTTP: `/_...` in JSON:API."""

import uuid
from typing import Any, cast

from rest_framework import exceptions, status
from rest_framework.permissions import IsAuthenticated
from rest_framework.request import Request
from rest_framework.response import Response

from lib.httperrors import BadGateway, BadRequest, Conflict, Forbidden, ServiceUnavailable
from lib.jsonapi.documents import JSONAPIParser, JSONParser, identifier
from lib.jsonapi.views import JSONAPIView
from realm import openid, throttles
from realm.authentication import RealmServerAuthentication
from realm.models import BotCommand, BotRegistration, NameTaken, User
from realm.serializers import (
    BotCommandSerializer,
    BotRegistrationSerializer,
    ServerSession,
    ServerSessionSerializer,
    check_owner,
)


class OpenIDTokenParser(JSONParser):
    """Parses a Matrix OpenID token, either as the homeserver issued it or as a document."""

    def parse_data(self, result: Any, parser_context: Any) -> Any:
        if not isinstance(result, dict) or "data" in result:
            return super().parse_data(result, parser_context)
        token = result.get("access_token")
        if not isinstance(token, str) or not 0 < len(token) <= openid.MAX_TOKEN_LENGTH:
            raise BadRequest("It must be a Matrix OpenID token.", pointer="/access_token")
        return {"access_token": token}


class ServerSessionView(JSONAPIView):
    serializer_class = ServerSessionSerializer
    parser_classes = [JSONAPIParser, OpenIDTokenParser]
    # A client that needs a new token may send the expired one.
    authentication_classes = []
    permission_classes = []
    throttle_classes = [throttles.ServerSessionThrottle]
    http_errors = {
        openid.OpenIDTokenRejected: exceptions.AuthenticationFailed,
        openid.HomeserverUnavailable: ServiceUnavailable,
        openid.InvalidHomeserverResponse: BadGateway,
        NameTaken: Conflict,
    }

    def get_authenticate_header(self, request: Request) -> str:
        return RealmServerAuthentication().authenticate_header(request)

    def post(self, request: Request) -> Response:
        serializer = self.get_serializer(data=request.data)
        serializer.is_valid(raise_exception=True)
        matrix_user_id = openid.matrix_user(serializer.validated_data["access_token"])
        user = User.objects.of_matrix_id(matrix_user_id)
        if not user.is_active:
            raise Forbidden("This account is deactivated.")
        session = ServerSession.of(user)
        return Response(
            self.get_serializer(session).data,
            status.HTTP_201_CREATED,
            headers={"Authorization": session.token},
        )


class RealmServerView(JSONAPIView):
    authentication_classes = [RealmServerAuthentication]
    permission_classes = [IsAuthenticated]

    @property
    def caller(self) -> User:
        return cast(User, self.request.user)

    def create(self, request: Request, **values: Any) -> Response:
        serializer = self.get_serializer(data=request.data)
        serializer.is_valid(raise_exception=True)
        serializer.save(**values)
        return Response(serializer.data, status.HTTP_201_CREATED)

    def destroy(self, request: Request, pk: str | None, model: Any) -> Response:
        """Delete by the id in the path, or else in the body. A missing row gets 204 too."""
        document: Any = {} if pk else request.data
        key = identifier(pk) if pk else identifier(document.get("id"), pointer="/data/id")
        deleted, _ = model.objects.of(self.caller).filter(pk=key).delete()
        if not deleted and model.objects.filter(pk=key).exists():
            raise Forbidden("This belongs to another user.")
        return Response(status=status.HTTP_204_NO_CONTENT)


class BotRegistrationView(RealmServerView):
    serializer_class = BotRegistrationSerializer

    def post(self, request: Request) -> Response:
        return self.create(request, user=self.caller)

    def delete(self, request: Request, id: str | None = None) -> Response:
        return self.destroy(request, id, BotRegistration)


class BotRegistrationsView(RealmServerView):
    serializer_class = BotRegistrationSerializer

    def get(self, request: Request) -> Response:
        rows = BotRegistration.objects.of(self.caller)
        return Response(self.get_serializer(rows, many=True).data)


class BotCommandsView(RealmServerView):
    serializer_class = BotCommandSerializer
    query_parameters = frozenset({"botId"})

    def get(self, request: Request) -> Response:
        """List the caller's commands, or those of one bot: `botId`."""
        rows = BotCommand.objects.of(self.caller)
        if bot_id := self._bot_id(request):
            rows = rows.filter(registration_id=bot_id)
        return Response(self.get_serializer(rows, many=True).data)

    def post(self, request: Request) -> Response:
        return self.create(request)

    def delete(self, request: Request, id: str | None = None) -> Response:
        return self.destroy(request, id, BotCommand)

    def _bot_id(self, request: Request) -> uuid.UUID | None:
        value = request.query_params.get("botId")
        if value is None:
            return None
        bot_id = identifier(value, parameter="botId")
        check_owner(bot_id, self.caller, parameter="botId")
        return bot_id
