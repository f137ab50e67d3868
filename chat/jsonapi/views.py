"""Views of the JSON:API: `/api/threads`, `/api/messages`, `/api/runs`."""

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
    CompoundDocument,
    DocumentJSONRenderer,
    DocumentRenderer,
    MessageSerializer,
    NewMessageSerializer,
    OfThread,
    Relationship,
    ResourceSerializer,
)
from chat.models import PAGE_CHARACTERS, fitting
from chat.permissions import CallerScopedView
from lib import paths
from lib.httperrors import BadRequest, Conflict, NotFound, TooManyRequests, Unprocessable
from lib.jsonapi.views import JSONAPIView


class ResourcesView(CallerScopedView, JSONAPIView):
    """Base of the views of a `serializer_class`. Views of related resources also set the `parent` and
    its `relation` to them."""

    serializer_class: type[ResourceSerializer]
    renderer_classes = [DocumentRenderer, DocumentJSONRenderer]
    parent: type[ResourceSerializer] = ResourceSerializer
    relation = ""
    compound: CompoundDocument | None = None

    def get_serializer_context(self) -> dict[str, Any]:
        return {**super().get_serializer_context(), "compound": self.compound}

    def rows(self) -> QuerySet[Any]:
        return self.serializer_class.rows(self.caller)

    def one(self, rows: QuerySet[Any], pk: Any) -> Any:
        row = rows.filter(pk=pk).first()
        if row is None:
            raise NotFound("There is nothing at this URL.")
        return row

    def owner(self) -> Any:
        """Return the parent that the URL names."""
        return self.one(self.parent.rows(self.caller), self.kwargs["id"])

    @property
    def relationship(self) -> Relationship:
        return self.parent().fields[self.relation]

    def represent(self, row: Any) -> Any:
        self.compound = self._compound([row])
        self.compound.load_contents()
        return self.get_serializer(row).data

    def page(
        self, rows: QuerySet[Any], order: pagination.Order
    ) -> tuple[Any, dict[str, str | None]]:
        page = pagination.paginate(rows, self.request.query_params, order, self._url, self._fitting)
        if self.compound:
            self.compound.load_contents()
        return self.get_serializer(page.rows, many=True).data, page.links

    def _fitting(self, rows: list[Any]) -> int:
        """Return how many of the rows fit on a page together with their included rows: at least one."""
        count = fitting(getattr(row, "size", 0) for row in rows)
        while True:
            self.compound = self._compound(rows[:count])
            if count == 1 or self.compound.size <= PAGE_CHARACTERS:
                return count
            count //= 2

    def _url(self, query: QueryDict) -> str:
        return f"{self.request.path}?{query.urlencode()}"

    def _compound(self, rows: list[Any]) -> CompoundDocument:
        paths = get_included_resources(self.request)
        return CompoundDocument(rows, self.serializer_class, paths, self.caller)


class ResourceView(ResourcesView):
    def get(self, request: Request, id: Any) -> Response:
        return Response(self.represent(self.one(self.rows(), id)))


class CollectionView(ResourcesView):
    @property
    def query_parameters(self) -> frozenset[str]:  # type: ignore[override]
        if self.request.method == "POST":
            return frozenset()
        filters = {f"filter[{name}]" for name in self.serializer_class.filters}
        return pagination.PARAMETERS | {"sort"} | filters

    @property
    def list_parameters(self) -> frozenset[str]:  # type: ignore[override]
        filters = self.serializer_class.filters
        return frozenset(f"filter[{name}]" for name, each in filters.items() if each.choices)

    def rows(self) -> QuerySet[Any]:
        """Return rows of rooms only for one thread; otherwise one index orders the list."""
        if "filter[thread]" in self.request.query_params:
            return super().rows()
        return self.serializer_class.own_rows(self.own_threads())

    def get(self, request: Request, id: Any = None) -> Response:
        order = pagination.order_of(request.query_params, self.sorts)
        data, links = self.page(self.filtered(self.rows()), order)
        return Response({"results": data, "links": links})

    @property
    def sorts(self) -> dict[str, pagination.Order]:
        return dict(self.serializer_class.sorts)

    def filtered(self, rows: QuerySet[Any]) -> QuerySet[Any]:
        for name, each in self.serializer_class.filters.items():
            parameter = f"filter[{name}]"
            if (value := self.request.query_params.get(parameter)) is not None:
                rows = each.of(rows, value, parameter)
        return rows


class OfThreadView(CollectionView):
    """The rows of a thread, by default in its order."""

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
        return Response(self.represent(self.one(self.rows(), other)))


class LinkageView(ResourcesView):
    """The resource identifiers of a relationship."""

    # The view builds the document, not the renderer.
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
            page = pagination.paginate(rows, request.query_params, ("position", "id"), self._url)
            data = [{"type": relationship.kind, "id": str(row.pk)} for row in page.rows]
            links |= page.links
        else:
            other = getattr(owner, relationship.column)
            data = {"type": relationship.kind, "id": str(other)} if other else None
        return Response({"links": links, "data": data})


class MessagesView(CollectionView):
    serializer_class = MessageSerializer
    relationships = frozenset({"thread"})
    http_errors = {inbox.UnknownThread: NotFound, inbox.UnknownUser: exceptions.NotAuthenticated}

    def document_serializer(self) -> type[NewMessageSerializer]:
        return NewMessageSerializer

    def handle_exception(self, exc: Exception) -> Response:
        if isinstance(exc, inbox.Invalid):
            code = getattr(exc, "code", "invalid")
            exc = BadRequest(str(exc), code, **ERROR_SOURCES[exc.name])
        elif isinstance(exc, inbox.Busy):
            exc = Conflict(str(exc), "thread_is_busy")
        elif isinstance(exc, inbox.Deleted):
            exc = Conflict(str(exc), exc.code, **ERROR_SOURCES["threadId"])
        elif isinstance(exc, inbox.KeyReused):
            exc = Unprocessable(str(exc), "idempotency_key_reused", header="Idempotency-Key")
        elif isinstance(exc, inbox.Limited):
            exc = TooManyRequests(str(exc), exc.code, wait=exc.retry_after)
        return super().handle_exception(exc)

    def post(self, request: Request) -> Response:
        """Create a message and queue its run."""
        body = NewMessageSerializer(data=request.data)
        body.is_valid(raise_exception=True)
        accepted = self.submit(**body.validated_data)
        message = self.one(self.rows(), accepted.message_id)
        headers = {"Location": paths.public(f"/api/messages/{message.pk}")}
        if accepted.repeated:
            headers["Idempotency-Replayed"] = "true"
        return Response(self.represent(message), status.HTTP_201_CREATED, headers=headers)


# The source of an error by the value that agents.inbox rejects.
ERROR_SOURCES = {
    "content": {"pointer": "/data/attributes/content"},
    "model": {"pointer": "/data/attributes/model"},
    "correlationId": {"pointer": "/data/attributes/correlationId"},
    "deadlineSeconds": {"pointer": "/data/attributes/deadlineSeconds"},
    "threadId": {"pointer": "/data/relationships/thread/data/id"},
    "Idempotency-Key": {"header": "Idempotency-Key"},
}
