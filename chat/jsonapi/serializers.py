"""JSON:API resources of the chat server: attributes, relationships, filters and sort orders."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from django.db.models import F, Model, QuerySet
from django.db.models.functions import Coalesce, Length
from rest_framework.fields import SkipField
from rest_framework.relations import PKOnlyObject
from rest_framework_json_api import serializers
from rest_framework_json_api.relations import ResourceRelatedField
from rest_framework_json_api.utils import format_field_name, get_serializer_fields

from agents import inbox
from agents.models import Run
from chat.fields import PolicyField, WholeNumberField
from chat.jsonapi.pagination import Order
from chat.models import CHOSEN_ID, Message, Thread, ThreadQuerySet, fitting, read_contents
from chat.representation import UsageJSON, usage_json
from lib import paths
from lib.httperrors import BadRequest, Conflict
from lib.jsonapi.documents import StringField
from lib.jsonapi.views import JSONAPIRenderer
from realm.models import User

# Turns included per thread; the relationship's own URL lists all.
INCLUDED_TURNS = 25


class Relationship(ResourceRelatedField):
    """A relationship without a query of its own: it is a link unless its rows are loaded."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        super().__init__(read_only=True)

    @property
    def target(self) -> "type[ResourceSerializer]":
        return self.parent.included_serializers[self.field_name]

    def load(self, rows: list[Any], others: QuerySet[Any], known: "LoadedRows") -> list[Any]:
        """Load the rows of `others` that the rows are related to, and note them on the rows."""
        raise NotImplementedError


class ToOne(Relationship):
    """A relationship to the row whose id is in a column."""

    def __init__(self, kind: str, column: str) -> None:
        self.column = column
        super().__init__(kind)

    def get_attribute(self, instance: Any) -> Any:
        return PKOnlyObject(getattr(instance, self.column))

    def to_representation(self, value: Any) -> Any:
        return {"type": self.kind, "id": str(value.pk)}

    def load(self, rows: list[Any], others: QuerySet[Any], known: "LoadedRows") -> list[Any]:
        ids = {getattr(row, self.column) for row in rows} - {None}
        missing = ids - known.of(others.model).keys()
        known.add(others.filter(pk__in=missing) if missing else [])
        return [known.of(others.model)[pk] for pk in ids & known.of(others.model).keys()]


class OfThread(Relationship):
    """A relationship to the rows of a thread. If included, those of the last turns, fewer if they are
    long."""

    def get_attribute(self, instance: Any) -> Any:
        included = getattr(instance, "included", {})
        if self.field_name not in included:
            raise SkipField
        return included[self.field_name]

    def to_representation(self, value: Any) -> Any:
        return [{"type": self.kind, "id": str(row.pk)} for row in value]

    def load(self, rows: list[Any], others: QuerySet[Any], known: "LoadedRows") -> list[Any]:
        newest_first = others.filter(
            thread__in=[row.pk for row in rows],
            position__gte=2 * (F("thread__turns") - INCLUDED_TURNS),
        ).order_by("-position")
        of_thread = defaultdict(list)
        for other in newest_first:
            of_thread[other.thread_id].append(other)
        loaded = []
        for row in rows:
            newest = of_thread[row.pk]
            shown = known.add(reversed(newest[: fitting(other.size for other in newest)]))
            row.included = getattr(row, "included", {}) | {self.field_name: shown}
            loaded += shown
        return loaded


class LoadedRows:
    """The rows of a document, each once."""

    def __init__(self) -> None:
        self.rows: dict[type[Model], dict[Any, Any]] = {}

    def of(self, model: type[Model]) -> dict[Any, Any]:
        return self.rows.setdefault(model, {})

    def add(self, rows: Iterable[Any]) -> list[Any]:
        return [self.of(type(row)).setdefault(row.pk, row) for row in rows]


class CompoundDocument:
    """A document's primary rows and the rows that `include` adds, as far as `reader` may read them: one
    query per step of a path. Contents are left out until `load_contents`."""

    def __init__(
        self,
        rows: list[Any],
        kind: "type[ResourceSerializer]",
        paths: Iterable[str],
        reader: User | None,
    ) -> None:
        self.reader = reader
        self.known = LoadedRows()
        self.kinds: dict[type[Model], type[ResourceSerializer]] = {}
        self.primary = {(type(row), row.pk) for row in self.known.add(rows)}
        self._load(rows, kind, [path.split(".") for path in paths])

    def _load(
        self, rows: list[Any], kind: "type[ResourceSerializer]", paths: list[list[str]]
    ) -> None:
        fields = kind().fields
        for name in dict.fromkeys(path[0] for path in paths):
            field = fields[name]
            target = kind.included_serializers[name]
            self.kinds[target.Meta.model] = target
            related = field.load(rows, target.rows(self.reader), self.known)
            self._load(
                related, target, [path[1:] for path in paths if path[0] == name and path[1:]]
            )

    @property
    def size(self) -> int:
        """The number of characters of all contents."""
        rows = (row for kind in (Message, Run) for row in self.known.of(kind).values())
        return sum(row.size for row in rows)

    def load_contents(self) -> None:
        answers = [run.answer for run in self.known.of(Run).values() if run.answer]
        read_contents([*self.known.of(Message).values(), *answers])

    @cached_property
    def included(self) -> "list[tuple[type[ResourceSerializer], list[Any]]]":
        added = [
            (model, [row for row in rows.values() if (model, row.pk) not in self.primary])
            for model, rows in self.known.rows.items()
        ]
        return [(self.kinds[model], rows) for model, rows in added if rows]


class DocumentRenderer(JSONAPIRenderer):
    @classmethod
    def extract_relationships(cls, fields: Any, resource: Any, resource_instance: Any) -> Any:
        relationships = {}
        for name, field in fields.items():
            if isinstance(field, Relationship):
                member = format_field_name(name)
                url = paths.public(f"/api/{field.parent.Meta.resource_name}/{resource_instance.pk}")
                links = {"self": f"{url}/relationships/{member}", "related": f"{url}/{member}"}
                relationships[member] = {"links": links}
                if name in resource:
                    relationships[member]["data"] = resource[name]
        return relationships

    @classmethod
    def build_json_resource_obj(cls, *args: Any, **kwargs: Any) -> Any:
        built = super().build_json_resource_obj(*args, **kwargs)
        built["links"] = {"self": paths.public(f"/api/{built['type']}/{built['id']}")}
        return built

    @classmethod
    def extract_included(
        cls,
        fields: Any,
        resource: Any,
        resource_instance: Any,
        included_resources: Any,
        included_cache: Any,
    ) -> None:
        """Add all included resources while the first primary resource is rendered."""
        context = fields.serializer.context
        for kind, rows in context["compound"].included if not included_cache else []:
            serializer = kind(rows, many=True, context=context)
            for row, data in zip(rows, serializer.data, strict=True):
                built = cls.build_json_resource_obj(
                    get_serializer_fields(serializer.child),
                    data,
                    row,
                    kind.Meta.resource_name,
                    serializer,
                )
                included_cache[built["type"]][built["id"]] = built


class DocumentJSONRenderer(DocumentRenderer):
    media_type = "application/json"


@dataclass(frozen=True)
class ResourceFilter:
    """`filter[name]`: rows whose column equals the value, or one of several choices."""

    column: str
    choices: tuple[str, ...] = ()
    max_length: int = 200

    def of(self, rows: QuerySet[Any], value: str, parameter: str) -> QuerySet[Any]:
        """Return the matching rows. Raises `BadRequest`."""
        if not self.choices:
            if len(value) > self.max_length or inbox.UNSTORABLE.search(value):
                raise BadRequest("Too long, or not a storable text.", parameter=parameter)
            return rows.filter(**{self.column: value})
        values = set(value.split(","))
        if not values <= set(self.choices):
            raise BadRequest(
                f"Must be one or more of {', '.join(self.choices)}.", parameter=parameter
            )
        return rows.filter(**{f"{self.column}__in": values})


class ResourceSerializer(serializers.ModelSerializer):
    filters: ClassVar[Mapping[str, ResourceFilter]] = {}
    # The first is the default.
    sorts: ClassVar[Mapping[str, Order]] = {}

    @classmethod
    def rows(cls, reader: User | None) -> QuerySet[Any]:
        """Return the rows that `reader` may read, without their contents; `size` is the number of
        characters of these."""
        raise NotImplementedError

    @classmethod
    def own_rows(cls, threads: ThreadQuerySet) -> QuerySet[Any]:
        """Return the rows of `threads`, the reader's own, in the same form."""
        raise NotImplementedError


class ThreadSerializer(ResourceSerializer):
    messages = OfThread("messages")
    runs = OfThread("runs")

    included_serializers = {
        "messages": "chat.jsonapi.serializers.MessageSerializer",
        "runs": "chat.jsonapi.serializers.RunSerializer",
    }
    sorts = {"updatedAt": ("-updated_at", "-id"), "createdAt": ("-created_at", "id")}

    class Meta:
        model = Thread
        resource_name = "threads"
        fields = ["title", "archived_at", "created_at", "updated_at", "messages", "runs"]

    @classmethod
    def rows(cls, reader: User | None) -> QuerySet[Thread]:
        return cls.own_rows(Thread.objects.open_to(reader))

    @classmethod
    def own_rows(cls, threads: ThreadQuerySet) -> QuerySet[Thread]:
        return threads.defer("summary")


class MessageSerializer(ResourceSerializer):
    thread = ToOne("threads", "thread_id")
    # The run that the message requested or that answered with it.
    run = ToOne("runs", "run_pk")

    included_serializers = {
        "thread": ThreadSerializer,
        "run": "chat.jsonapi.serializers.RunSerializer",
    }
    filters = {
        "thread": ResourceFilter("thread"),
        "role": ResourceFilter("role", tuple(Message.Role.values)),
        "correlationId": ResourceFilter("correlation_id"),
    }
    sorts = {"createdAt": ("-created_at", "id"), "position": ("position", "id")}

    class Meta:
        model = Message
        resource_name = "messages"
        fields = ["role", "content", "position", "correlation_id", "created_at", "thread", "run"]

    @classmethod
    def rows(cls, reader: User | None) -> QuerySet[Message]:
        return cls._sized(Message.objects.visible_to(reader))

    @classmethod
    def own_rows(cls, threads: ThreadQuerySet) -> QuerySet[Message]:
        return cls._sized(Message.objects.filter(thread__in=threads))

    @staticmethod
    def _sized(messages: QuerySet[Message]) -> QuerySet[Message]:
        run_pk = Coalesce("run__id", "answered_run__id")
        return messages.annotate(run_pk=run_pk, size=Length("content")).defer("content")


class RunSerializer(ResourceSerializer):
    usage = serializers.SerializerMethodField()
    output = serializers.CharField(source="answer.content", default=None, allow_null=True)
    safe_error = serializers.SerializerMethodField()
    error_code = serializers.SerializerMethodField()
    finish_reason = serializers.SerializerMethodField()
    thread = ToOne("threads", "thread_id")
    message = ToOne("messages", "message_id")
    answer = ToOne("messages", "answer_id")
    # The run that answers this run's message as well.
    merged_into = ToOne("runs", "merged_into_id")

    included_serializers = {
        "thread": ThreadSerializer,
        "message": MessageSerializer,
        "answer": MessageSerializer,
        "merged_into": "self",
    }
    filters = {
        "thread": ResourceFilter("thread"),
        "status": ResourceFilter("status", tuple(Run.Status.values)),
        "source": ResourceFilter("source", tuple(Run.Source.values)),
        "model": ResourceFilter("model"),
        "correlationId": ResourceFilter("correlation_id"),
    }
    sorts = {"createdAt": ("-created_at", "id"), "position": ("position", "id")}

    class Meta:
        model = Run
        resource_name = "runs"
        fields = [
            "status",
            "model",
            "source",
            "attempt",
            "output",
            "safe_error",
            "error_code",
            "finish_reason",
            "usage",
            "correlation_id",
            "created_at",
            "started_at",
            "finished_at",
            "deadline_at",
            "updated_at",
            "thread",
            "message",
            "answer",
            "merged_into",
        ]

    @classmethod
    def rows(cls, reader: User | None) -> QuerySet[Run]:
        return cls._sized(Run.objects.visible_to(reader))

    @classmethod
    def own_rows(cls, threads: ThreadQuerySet) -> QuerySet[Run]:
        return cls._sized(Run.objects.filter(thread__in=threads))

    @staticmethod
    def _sized(runs: QuerySet[Run]) -> QuerySet[Run]:
        size = Coalesce(Length("answer__content"), 0)
        return runs.select_related("answer").annotate(size=size).defer("answer__content")

    def get_usage(self, run: Run) -> UsageJSON:
        return usage_json(run)

    def get_safe_error(self, run: Run) -> str | None:
        return run.safe_error or None

    def get_error_code(self, run: Run) -> str | None:
        return run.error_code or None if run.safe_error else None

    def get_finish_reason(self, run: Run) -> str | None:
        return run.finish_reason or None


class ThreadLink(serializers.Field):
    """The thread of a new message, by its id; an unused id creates a thread."""

    def to_internal_value(self, data: Any) -> str:
        pointer = "/data/relationships/thread/data"
        if not (
            isinstance(data, dict)
            and isinstance(data.get("type"), str)
            and isinstance(data.get("id"), str)
        ):
            raise BadRequest("The thread must be one resource identifier.", pointer=pointer)
        if data["type"] != "threads":
            raise Conflict("The type must be 'threads'.", pointer=f"{pointer}/type")
        if not CHOSEN_ID.match(data["id"]):
            raise BadRequest(
                "Must be 1 to 64 letters, digits, '_' or '-'.", "invalid", pointer=f"{pointer}/id"
            )
        return data["id"]


class NewMessageSerializer(serializers.Serializer):
    """The shape of a submitted message; agents.inbox enforces the rules."""

    content = StringField(error_messages={"blank": "Write at least 1 character."})
    model = StringField(required=False, allow_null=True, max_length=100)
    correlation_id = StringField(required=False, allow_null=True)
    when_busy = PolicyField(required=False, allow_null=True)
    deadline_seconds = WholeNumberField(required=False, allow_null=True)
    thread = ThreadLink(required=False, allow_null=True, source="thread_id")

    class Meta:
        resource_name = "messages"
