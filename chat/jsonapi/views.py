"""The chat server's JSON:API: `/api/threads`, `/api/messages`, `/api/runs`."""

from typing import Any

from django.db.models import QuerySet
from django.http import QueryDict
from rest_framework import exceptions, status
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework_json_api.utils import get_included_resources

from agents import inbox
from chat.jsonapi import pagination
from chat.jsonapi.serializers import (
    Compound,
    DocumentJSONRenderer,
    DocumentRenderer,
    MessageSerializer,
    OfThread,
    QuestionSerializer,
    Relationship,
    ResourceSerializer,
)
from chat.models import PAGE_CHARACTERS, fitting
from chat.permissions import CallerScopedView
from lib.httperrors import BadRequest, Conflict, NotFound, TooManyRequests, Unprocessable
from lib.jsonapi.views import JSONAPIView


class ResourcesView(CallerScopedView, JSONAPIView):
    """To be used with the `serializer_class` of what it tells, and where that hangs on something
    else, with the `parent` and the `relation` that leads to it."""

    serializer_class: type[ResourceSerializer]
    renderer_classes = [DocumentRenderer, DocumentJSONRenderer]
    parent: type[ResourceSerializer] = ResourceSerializer
    relation = ""
    compound: Compound | None = None

    def get_serializer_context(self) -> dict[str, Any]:
        return {**super().get_serializer_context(), "compound": self.compound}

    def rows(self) -> QuerySet[Any]:
        return self.serializer_class.rows(self.caller)

    def one(self, rows: QuerySet[Any], pk: Any) -> Any:
        found = rows.filter(pk=pk).first()
        if found is None:
            raise NotFound("There is nothing at this URL.")
        return found

    def owner(self) -> Any:
        """What the address leads through."""
        return self.one(self.parent.rows(self.caller), self.kwargs["id"])

    @property
    def relationship(self) -> Relationship:
        return self.parent().fields[self.relation]

    def told(self, row: Any) -> Any:
        self.compound = self._compound([row])
        self.compound.read()
        return self.get_serializer(row).data

    def page(
        self, rows: QuerySet[Any], order: pagination.Order
    ) -> tuple[Any, dict[str, str | None]]:
        page = pagination.cut(rows, self.request.query_params, order, self._address, self._fitting)
        if self.compound:
            self.compound.read()
        return self.get_serializer(page.rows, many=True).data, page.links

    def _fitting(self, rows: list[Any]) -> int:
        """How many of the rows a page has room for, with what `include` adds to them: at least one."""
        count = fitting(getattr(row, "size", 0) for row in rows)
        while True:
            self.compound = self._compound(rows[:count])
            if count == 1 or self.compound.size <= PAGE_CHARACTERS:
                return count
            count //= 2

    def _address(self, query: QueryDict) -> str:
        return f"{self.request.path}?{query.urlencode()}"

    def _compound(self, rows: list[Any]) -> Compound:
        paths = get_included_resources(self.request)
        return Compound(rows, self.serializer_class, paths, self.caller)


class ResourceView(ResourcesView):
    def get(self, request: Request, id: Any) -> Response:
        return Response(self.told(self.one(self.rows(), id)))


class CollectionView(ResourcesView):
    @property
    def query_parameters(self) -> frozenset[str]:  # type: ignore[override]
        if self.request.method == "POST":
            return frozenset()
        filters = {f"filter[{name}]" for name in self.serializer_class.filters}
        return pagination.PARAMETERS | {"sort"} | filters

    def rows(self) -> QuerySet[Any]:
        """Those of rooms only with the name of their thread: the others are read along one index."""
        if "filter[thread]" in self.request.query_params:
            return super().rows()
        return self.serializer_class.own_rows(self.own_threads())

    def get(self, request: Request, id: Any = None) -> Response:
        order = pagination.chosen(request.query_params, self.sorts)
        data, links = self.page(self.filtered(self.rows()), order)
        return Response({"results": data, "links": links})

    @property
    def sorts(self) -> dict[str, pagination.Order]:
        return dict(self.serializer_class.sorts)

    def filtered(self, rows: QuerySet[Any]) -> QuerySet[Any]:
        for name, chosen in self.serializer_class.filters.items():
            parameter = f"filter[{name}]"
            if (value := self.request.query_params.get(parameter)) is not None:
                rows = chosen.of(rows, value, parameter)
        return rows


class OfThreadView(CollectionView):
    """What stands in a thread, in its order where no other is asked for."""

    def rows(self) -> QuerySet[Any]:
        return self.serializer_class.rows(self.caller).filter(thread=self.owner())

    @property
    def sorts(self) -> dict[str, pagination.Order]:
        return {"position": ("position", "id")} | super().sorts


class RelatedView(ResourcesView):
    def get(self, request: Request, id: Any) -> Response:
        other = getattr(self.owner(), self.relationship.column)
        if other is None:
            return Response(None)
        return Response(self.told(self.one(self.rows(), other)))


class LinkageView(ResourcesView):
    """Which ones a relationship leads to, without telling them."""

    # The document is made here, not by the renderer.
    resource_name = False

    @property
    def query_parameters(self) -> frozenset[str]:  # type: ignore[override]
        return pagination.PARAMETERS if isinstance(self.relationship, OfThread) else frozenset()

    def get(self, request: Request, id: Any) -> Response:
        owner, relationship = self.owner(), self.relationship
        related = request.path.replace("/relationships/", "/")
        links: dict[str, str | None] = {"self": request.path, "related": related}
        data: Any
        if isinstance(relationship, OfThread):
            rows = self.rows().filter(thread=owner)
            page = pagination.cut(rows, request.query_params, ("position", "id"), self._address)
            data = [{"type": relationship.kind, "id": str(row.pk)} for row in page.rows]
            links |= page.links
        else:
            other = getattr(owner, relationship.column)
            data = {"type": relationship.kind, "id": str(other)} if other else None
        return Response({"links": links, "data": data})


class MessagesView(CollectionView):
    serializer_class = MessageSerializer
    http_errors = {inbox.UnknownThread: NotFound, inbox.UnknownAsker: exceptions.NotAuthenticated}

    def handle_exception(self, exc: Exception) -> Response:
        if isinstance(exc, inbox.Invalid):
            code = getattr(exc, "code", "invalid")
            exc = BadRequest(str(exc), code, **WHERE[exc.name])
        elif isinstance(exc, inbox.Busy):
            exc = Conflict(str(exc), "thread_is_busy")
        elif isinstance(exc, inbox.Deleted):
            exc = Conflict(str(exc), exc.code, **WHERE["threadId"])
        elif isinstance(exc, inbox.KeyReused):
            exc = Unprocessable(str(exc), "idempotency_key_reused", header="Idempotency-Key")
        elif isinstance(exc, inbox.Limited):
            exc = TooManyRequests(str(exc), exc.code, wait=exc.retry_after)
        return super().handle_exception(exc)

    def post(self, request: Request) -> Response:
        """Ask. The message is there at once; its run tells what becomes of it."""
        question = QuestionSerializer(data=request.data)
        question.is_valid(raise_exception=True)
        accepted = self.submit(**question.validated_data)
        message = self.one(self.rows(), accepted.message_id)
        headers = {"Location": f"/api/messages/{message.pk}"}
        if accepted.repeated:
            headers["Idempotency-Replayed"] = "true"
        return Response(self.told(message), status.HTTP_201_CREATED, headers=headers)


# Where in a document a value stands that agents.inbox refuses.
WHERE = {
    "content": {"pointer": "/data/attributes/content"},
    "model": {"pointer": "/data/attributes/model"},
    "correlationId": {"pointer": "/data/attributes/correlationId"},
    "deadlineSeconds": {"pointer": "/data/attributes/deadlineSeconds"},
    "threadId": {"pointer": "/data/relationships/thread/data/id"},
    "Idempotency-Key": {"header": "Idempotency-Key"},
}
