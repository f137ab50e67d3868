"""The JSON:API resources of the chat server: what each tells, how they hang together, and what a list
of them can be asked for."""

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
from lib.httperrors import BadRequest, Conflict
from lib.jsonapi.documents import StringField
from lib.jsonapi.views import JSONAPIRenderer
from realm.models import User

# Of each thread that `include` adds them to; all of them are at the relationship's own address.
NEWEST_TURNS = 25


class Relationship(ResourceRelatedField):
    """Told without a query: what is not loaded is a link."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        super().__init__(read_only=True)

    @property
    def target(self) -> "type[ResourceSerializer]":
        return self.parent.included_serializers[self.field_name]

    def load(self, rows: list[Any], others: QuerySet[Any], known: "Known") -> list[Any]:
        """Those of `others` that the rows are related to; afterwards the rows can tell which."""
        raise NotImplementedError


class ToOne(Relationship):
    """To the one that a column of the row names."""

    def __init__(self, kind: str, column: str) -> None:
        self.column = column
        super().__init__(kind)

    def get_attribute(self, instance: Any) -> Any:
        return PKOnlyObject(getattr(instance, self.column))

    def to_representation(self, value: Any) -> Any:
        return {"type": self.kind, "id": str(value.pk)}

    def load(self, rows: list[Any], others: QuerySet[Any], known: "Known") -> list[Any]:
        wanted = {getattr(row, self.column) for row in rows} - {None}
        missing = wanted - known.of(others.model).keys()
        known.add(others.filter(pk__in=missing) if missing else [])
        return [known.of(others.model)[pk] for pk in wanted & known.of(others.model).keys()]


class OfThread(Relationship):
    """To what stands in a thread: of the last turns where it is included, in their order; fewer of it
    where it is long."""

    def get_attribute(self, instance: Any) -> Any:
        included = getattr(instance, "included", {})
        if self.field_name not in included:
            raise SkipField
        return included[self.field_name]

    def to_representation(self, value: Any) -> Any:
        return [{"type": self.kind, "id": str(row.pk)} for row in value]

    def load(self, rows: list[Any], others: QuerySet[Any], known: "Known") -> list[Any]:
        newest_first = others.filter(
            thread__in=[row.pk for row in rows],
            position__gte=2 * (F("thread__turns") - NEWEST_TURNS),
        ).order_by("-position")
        of_thread = defaultdict(list)
        for other in newest_first:
            of_thread[other.thread_id].append(other)
        found = []
        for row in rows:
            newest = of_thread[row.pk]
            told = known.add(reversed(newest[: fitting(other.size for other in newest)]))
            row.included = getattr(row, "included", {}) | {self.field_name: told}
            found += told
        return found


class Known:
    """The rows of a document, each once."""

    def __init__(self) -> None:
        self.rows: dict[type[Model], dict[Any, Any]] = {}

    def of(self, model: type[Model]) -> dict[Any, Any]:
        return self.rows.setdefault(model, {})

    def add(self, rows: Iterable[Any]) -> list[Any]:
        return [self.of(type(row)).setdefault(row.pk, row) for row in rows]


class Compound:
    """A document's primary rows and what `include` adds to them: one query for each step of a path,
    of what `reader` may read. What was said is left out until `read`."""

    def __init__(
        self,
        rows: list[Any],
        kind: "type[ResourceSerializer]",
        paths: Iterable[str],
        reader: User | None,
    ) -> None:
        self.reader = reader
        self.known = Known()
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
            found = field.load(rows, target.rows(self.reader), self.known)
            self._load(found, target, [path[1:] for path in paths if path[0] == name and path[1:]])

    @property
    def size(self) -> int:
        """How many characters were said in all that it tells."""
        rows = (row for kind in (Message, Run) for row in self.known.of(kind).values())
        return sum(row.size for row in rows)

    def read(self) -> None:
        """Fill in what was said."""
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
        told = {}
        for name, field in fields.items():
            if isinstance(field, Relationship):
                member = format_field_name(name)
                at = f"/api/{field.parent.Meta.resource_name}/{resource_instance.pk}"
                links = {"self": f"{at}/relationships/{member}", "related": f"{at}/{member}"}
                told[member] = {"links": links}
                if name in resource:
                    told[member]["data"] = resource[name]
        return told

    @classmethod
    def build_json_resource_obj(cls, *args: Any, **kwargs: Any) -> Any:
        built = super().build_json_resource_obj(*args, **kwargs)
        built["links"] = {"self": f"/api/{built['type']}/{built['id']}"}
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
        """All that there is to add, with the first of the primary resources."""
        context = fields.serializer.context
        for kind, rows in context["compound"].included if not included_cache else []:
            told = kind(rows, many=True, context=context)
            for row, data in zip(rows, told.data, strict=True):
                built = cls.build_json_resource_obj(
                    get_serializer_fields(told.child), data, row, kind.Meta.resource_name, told
                )
                included_cache[built["type"]][built["id"]] = built


class DocumentJSONRenderer(DocumentRenderer):
    media_type = "application/json"


@dataclass(frozen=True)
class Filter:
    """`filter[name]`: the rows of which a column says just that, or one of several choices."""

    column: str
    choices: tuple[str, ...] = ()
    max_length: int = 200

    def of(self, rows: QuerySet[Any], value: str, parameter: str) -> QuerySet[Any]:
        """Raises `BadRequest`."""
        if not self.choices:
            if len(value) > self.max_length or inbox.UNSTORABLE.search(value):
                raise BadRequest("Nothing can have this value.", parameter=parameter)
            return rows.filter(**{self.column: value})
        wanted = set(value.split(","))
        if not wanted <= set(self.choices):
            raise BadRequest(f"One or more of {', '.join(self.choices)}.", parameter=parameter)
        return rows.filter(**{f"{self.column}__in": wanted})


class ResourceSerializer(serializers.ModelSerializer):
    filters: ClassVar[Mapping[str, Filter]] = {}
    # The first is what a list comes in that nothing else is asked of.
    sorts: ClassVar[Mapping[str, Order]] = {}

    @classmethod
    def rows(cls, reader: User | None) -> QuerySet[Any]:
        """All that `reader` may read, with all that its document needs but the words: of these, `size`
        is the number of characters."""
        raise NotImplementedError

    @classmethod
    def own_rows(cls, threads: ThreadQuerySet) -> QuerySet[Any]:
        """Likewise what stands in the reader's own threads."""
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
    # That it asked for, or that it is the answer of.
    run = ToOne("runs", "run_pk")

    included_serializers = {
        "thread": ThreadSerializer,
        "run": "chat.jsonapi.serializers.RunSerializer",
    }
    filters = {
        "thread": Filter("thread"),
        "role": Filter("role", tuple(Message.Role.values)),
        "correlationId": Filter("correlation_id"),
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
    thread = ToOne("threads", "thread_id")
    message = ToOne("messages", "message_id")
    answer = ToOne("messages", "answer_id")
    # That answers its question too.
    merged_into = ToOne("runs", "merged_into_id")

    included_serializers = {
        "thread": ThreadSerializer,
        "message": MessageSerializer,
        "answer": MessageSerializer,
        "merged_into": "self",
    }
    filters = {
        "thread": Filter("thread"),
        "status": Filter("status", tuple(Run.Status.values)),
        "source": Filter("source", tuple(Run.Source.values)),
        "model": Filter("model"),
        "correlationId": Filter("correlation_id"),
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


class ThreadLink(serializers.Field):
    """The thread to ask in, by its id; one that nobody has yet is begun."""

    def to_internal_value(self, data: Any) -> str:
        pointer = "/data/relationships/thread/data"
        if not (
            isinstance(data, dict)
            and isinstance(data.get("type"), str)
            and isinstance(data.get("id"), str)
        ):
            raise BadRequest("A message is in one thread.", pointer=pointer)
        if data["type"] != "threads":
            raise Conflict("The type here is 'threads'.", pointer=f"{pointer}/type")
        if not CHOSEN_ID.match(data["id"]):
            raise BadRequest(
                "1 to 64 letters, digits, '_' or '-'.", "invalid", pointer=f"{pointer}/id"
            )
        return data["id"]


class QuestionSerializer(serializers.Serializer):
    """Only the shape; agents.inbox has the rules."""

    content = StringField(error_messages={"blank": "Write at least 1 character."})
    model = StringField(required=False, allow_null=True, max_length=100)
    correlation_id = StringField(required=False, allow_null=True)
    when_busy = PolicyField(required=False, allow_null=True)
    deadline_seconds = WholeNumberField(required=False, allow_null=True)
    thread = ThreadLink(required=False, allow_null=True, source="thread_id")

    class Meta:
        resource_name = "messages"
