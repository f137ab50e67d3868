"""What every page of the admin is made of. The theme is known here and nowhere else."""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from django import forms
from django.contrib import messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.admin.models import LogEntry
from django.contrib.admin.options import IS_POPUP_VAR
from django.contrib.admin.utils import quote, unquote
from django.core.exceptions import PermissionDenied, ValidationError
from django.db import transaction
from django.db.models import QuerySet
from django.db.models.functions import Length, Substr
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.shortcuts import redirect
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils.text import Truncator
from unfold.admin import ModelAdmin, StackedInline, TabularInline
from unfold.forms import BaseDialogForm
from unfold.widgets import UnfoldAdminTextInputWidget

from console import audit, bulk, export
from console.paging import Paged, Period

__all__ = [
    "ASK",
    "Bodies",
    "BodiesInline",
    "ConsoleAdmin",
    "Empty",
    "Inline",
    "Page",
    "Period",
    "ReadOnly",
    "ReadOnlyAdmin",
    "ReadOnlyInline",
    "Reasoned",
    "StackedInline",
    "back_to",
    "body",
    "dialog",
    "may_read",
]
BEGINNING = 80


def may_read(request: HttpRequest, owner: Any) -> bool:
    """Whether whoever sends `request` may read what was said to and by `owner`: a user, the id of
    one, or None for nobody."""
    owner = getattr(owner, "pk", owner)
    return _is(request, owner) or request.user.has_perm("chat.read_messages")


def _is(request: HttpRequest, owner: Any) -> bool:
    return owner is not None and owner == request.user.pk


def body(request: HttpRequest, text: Any, owner: Any) -> str:
    """What was said, or how much that was for those who may not read it."""
    text = _text(text)
    return text if may_read(request, owner) else masked(text)


def masked(text: str) -> str:
    return _masked(len(text))


def _masked(size: int) -> str:
    return f"•••• {size} characters" if size else ""


def _text(value: Any) -> str:
    if value in (None, "", {}, []):
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1)


def _follow(obj: Any, path: str) -> Any:
    """`message.content` of a run."""
    for name in path.split("."):
        obj = getattr(obj, name, None)
    return obj


@dataclass(frozen=True)
class _Shown:
    """A column or a field that holds a body, for one request. Equal ones must be equal: Django asks
    for the fields of a form and for those to be left out of it one after the other."""

    request: HttpRequest
    name: str
    path: str
    # Whose words they are, or the admin that can tell of each row.
    owner: Any
    limit: int | None = None

    def __call__(self, row: Any) -> str:
        owner = self.owner.owner_of(row) if isinstance(self.owner, Bodies) else self.owner
        allowed = may_read(self.request, owner)
        if self.limit and hasattr(row, f"size_of_{self.name}"):
            # As `beginnings` has read it.
            if not allowed:
                return _masked(getattr(row, f"size_of_{self.name}") or 0)
            text = getattr(row, f"beginning_of_{self.name}") or ""
        else:
            text = _text(_follow(row, self.path))
        if not allowed:
            return masked(text)
        return Truncator(text).chars(self.limit) if self.limit else text

    @property
    def __name__(self) -> str:
        return self.name

    @property
    def short_description(self) -> str:
        return self.name.replace("_", " ")


def _replaced(names: Any, shown: dict[str, Any]) -> list[Any]:
    return [shown.get(name, name) if isinstance(name, str) else name for name in names]


def beginnings(
    rows: QuerySet[Any], bodies: dict[str, str], shown: Collection[Any], *, whole: bool
) -> QuerySet[Any]:
    """The rows of a list, of whose bodies no more is read than it shows: a page has a hundred rows, and
    each may have a megabyte. `whole`: an export, which has all of those shown."""
    columns = {name: path.replace(".", "__") for name, path in bodies.items()}
    needed = {columns[name] for name in columns if name in shown}
    rows = rows.defer(*({*columns.values()} - needed if whole else columns.values()))
    for name, column in columns.items():
        if name in shown and not whole:
            beginning = Substr(column, 1, 4 * BEGINNING)
            read = {f"beginning_of_{name}": beginning, f"size_of_{name}": Length(column)}
            rows = rows.annotate(**read)
    return rows


class Bodies:
    """A page that shows what people said and were told: masked for those without
    `chat.read_messages`, in the list and on the page; reading it leaves an audit entry."""

    # A column's or field's name, and where its text is: {"question": "message.content"}
    bodies: dict[str, str] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in cls.bodies:
            # Django's checks look for each column; it is replaced before it is shown.
            setattr(cls, name, None)

    def thread_of(self, obj: Any) -> Any:
        """What is read, as the audit trail names it."""
        return obj.thread

    def owner_of(self, obj: Any) -> Any:
        """The id of whose words they are. Lists ask it of each row: see to `list_select_related`."""
        return getattr(self.thread_of(obj), "owner_id", None)

    def lookup_allowed(self, lookup: str, value: Any, request: HttpRequest) -> bool:
        """Not by a body: whoever may ask how a text begins can read it letter by letter."""
        if lookup.partition("__")[0] in self.bodies.values():
            return False
        allowed: bool = super().lookup_allowed(lookup, value, request)  # type: ignore[misc]
        return allowed

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        rows: QuerySet[Any] = super().get_queryset(request)  # type: ignore[misc]
        page = request.resolver_match
        is_list = page is not None and (page.url_name or "").endswith("_changelist")
        if not is_list:
            return rows
        shown: Any = self.list_display  # type: ignore[attr-defined]
        return beginnings(rows, self.bodies, shown, whole=request.method == "POST")

    def get_list_display(self, request: HttpRequest) -> list[Any]:
        names: Any = super().get_list_display(request)  # type: ignore[misc]
        return _replaced(
            names,
            {
                name: _Shown(request, name, path, self, BEGINNING)
                for name, path in self.bodies.items()
            },
        )

    def get_fields(self, request: HttpRequest, obj: Any = None) -> list[Any]:
        return _replaced(
            super().get_fields(request, obj),  # type: ignore[misc]
            self._shown_of(request, obj),
        )

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[Any]:
        shown = self._shown_of(request, obj)
        names: Any = super().get_readonly_fields(request, obj)  # type: ignore[misc]
        return [*_replaced(names, shown), *(row for row in shown.values() if row not in names)]

    def _shown_of(self, request: HttpRequest, obj: Any) -> dict[str, Any]:
        owner = self.owner_of(obj) if obj is not None else None
        return {name: _Shown(request, name, path, owner) for name, path in self.bodies.items()}

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> HttpResponse:
        response: HttpResponse = super().changelist_view(request, extra_context)  # type: ignore[misc]
        shows = set(self.bodies) & {name for name in self.list_display if isinstance(name, str)}  # type: ignore[attr-defined]
        if shows and request.method == "GET" and may_read(request, None):
            audit.reading(request, self.model, f"the list, {request.GET.urlencode() or 'all'}")  # type: ignore[attr-defined]
        return response

    def render_change_form(
        self, request: HttpRequest, context: Any, *args: Any, obj: Any = None, **kwargs: Any
    ) -> HttpResponse:
        if obj is not None:
            self.read(request, obj)
        page: HttpResponse = super().render_change_form(  # type: ignore[misc]
            request, context, *args, obj=obj, **kwargs
        )
        return page

    def read(self, request: HttpRequest, obj: Any) -> None:
        """Note it where somebody reads the words of others; for pages of one's own, too."""
        owner = self.owner_of(obj)
        if may_read(request, owner) and not _is(request, owner):
            audit.reading(request, self.thread_of(obj))


class BodiesInline:
    """The same for rows on the page of an admin with `Bodies`, whose owner is theirs."""

    bodies: dict[str, str] = {}

    def get_fields(self, request: HttpRequest, obj: Any = None) -> list[Any]:
        names: Any = super().get_fields(request, obj)  # type: ignore[misc]
        return _replaced(names, self._shown_of(request, obj))

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[Any]:
        shown = self._shown_of(request, obj)
        names: Any = super().get_readonly_fields(request, obj)  # type: ignore[misc]
        return _replaced(names, shown)

    def _shown_of(self, request: HttpRequest, obj: Any) -> dict[str, Any]:
        admin = self.admin_site.get_model_admin(self.parent_model)  # type: ignore[attr-defined]
        owner = admin.owner_of(obj) if obj is not None else None
        return {name: _Shown(request, name, path, owner) for name, path in self.bodies.items()}


class ReadOnly:
    """What the system writes, nobody edits."""

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[Any]:
        # Django builds a form even where nothing may be changed, and cannot put every field in one.
        return list(getattr(self, "fields", None) or ())


@dataclass(frozen=True)
class Empty:
    """What a list without rows tells to do next."""

    text: str
    command: str = ""


ASK = """curl localhost:3000/api/chat/messages -d '{"content": "Hello"}'"""


class ConsoleAdmin(Paged, ModelAdmin):
    empty = Empty("There is nothing to see yet.")
    list_per_page = 50
    list_fullwidth = True
    list_filter_submit = False
    compressed_fields = True

    def get_actions(self, request: HttpRequest) -> dict[str, Any]:
        actions: dict[str, Any] = super().get_actions(request)
        if self.actions is None or IS_POPUP_VAR in request.GET:
            return actions
        for deed in bulk.deeds_for(request, self.model):
            name = deed.name.partition(".")[2]
            actions[name] = (partial(_confirm, deed=deed), name, deed.title)
        if request.user.has_perm(export.PERMISSION):
            actions["export_csv"] = (_export, "export_csv", "Export as CSV")
        return actions

    def log_addition(self, request: HttpRequest, obj: Any, message: Any) -> LogEntry:
        entry: LogEntry = super().log_addition(request, obj, message)
        audit.note(request, audit.Action.ADD, obj, result=entry.get_change_message())
        return entry

    def log_change(self, request: HttpRequest, obj: Any, message: Any) -> LogEntry:
        entry: LogEntry = super().log_change(request, obj, message)
        audit.note(request, audit.Action.CHANGE, obj, result=entry.get_change_message())
        return entry

    def log_deletions(self, request: HttpRequest, queryset: QuerySet[Any]) -> Any:
        with transaction.atomic():
            for obj in queryset:
                audit.note(request, audit.Action.DELETE, obj)
            return super().log_deletions(request, queryset)


def _confirm(
    admin: ConsoleAdmin, request: HttpRequest, rows: QuerySet[Any], *, deed: bulk.Deed
) -> HttpResponse:
    """Ask whether a deed is to be done to all these rows, and why; then have it done."""
    reason = request.POST.get("reason", "").strip()
    if reason:
        job = bulk.start(request, deed, rows, reason=reason)
        return redirect("admin:console_bulkjob_change", job.pk)
    context = {
        **admin.admin_site.each_context(request),
        "title": f"{deed.title}: are you sure?",
        "opts": admin.opts,
        "deed": deed,
        "number": rows.count(),
        "action": request.POST["action"],
        "select_across": request.POST.get("select_across", "0"),
        "chosen": request.POST.getlist(ACTION_CHECKBOX_NAME),
        "reason_missing": "reason" in request.POST,
    }
    return TemplateResponse(request, "console/confirm_bulk.html", context)


def _export(admin: ConsoleAdmin, request: HttpRequest, rows: QuerySet[Any]) -> Any:
    columns = [
        replace(column, limit=None) if isinstance(column, _Shown) else column
        for column in admin.get_list_display(request)
        if column != "action_checkbox"
    ]
    return export.response(request, admin, rows, columns)


class Inline(TabularInline):
    extra = 0
    tab = False


class ReadOnlyAdmin(ReadOnly, ConsoleAdmin):
    def get_sortable_by(self, request: HttpRequest) -> list[str]:
        """By what there is an index for, which is what the list is ordered by."""
        if self.sortable_by is not None:
            return list(self.sortable_by)
        return [name.removeprefix("-") for name in (self.ordering or ())[:1]]


class ReadOnlyInline(ReadOnly, Inline):
    max_num = 0


class Page:
    """A page of its own in place of Django's form, for a row that nobody edits. With `?live` it is
    the part that updates itself."""

    page_template = ""
    live_template = ""
    page_related: Sequence[str] = ()

    def page(self, request: HttpRequest, obj: Any) -> dict[str, Any]:
        """What the templates are given beside the row and its actions."""
        raise NotImplementedError

    def offered(self, obj: Any) -> Collection[str]:
        """Those of `actions_detail` that the state of the row allows."""
        return self.actions_detail  # type: ignore[attr-defined]

    def get_object(self, request: HttpRequest, object_id: str, from_field: Any = None) -> Any:
        queryset = self.get_queryset(request)  # type: ignore[attr-defined]
        try:
            pk = queryset.model._meta.pk.to_python(object_id)
        except ValidationError:
            return None
        if "\0" in object_id:  # PostgreSQL's driver takes none
            return None
        return queryset.select_related(*self.page_related).filter(pk=pk).first()

    def changeform_view(
        self,
        request: HttpRequest,
        object_id: str | None = None,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> HttpResponse:
        admin: Any = self
        if object_id is None or request.method == "POST":
            raise PermissionDenied
        obj = self.get_object(request, unquote(object_id))
        if obj is None:
            missing: HttpResponse = admin._get_obj_does_not_exist_redirect(
                request, admin.opts, object_id
            )
            return missing
        if not admin.has_view_permission(request, obj):
            raise PermissionDenied
        if isinstance(self, Bodies):
            self.read(request, obj)
        is_live = "live" in request.GET
        context = {
            **({} if is_live else admin.admin_site.each_context(request)),
            **(extra_context or {}),
            "opts": admin.opts,
            "original": obj,
            "title": str(obj),
            "owner": self.owner_of(obj) if isinstance(self, Bodies) else None,
            "page_actions": self._actions(request, obj),
            **self.page(request, obj),
        }
        template = self.live_template if is_live else self.page_template
        request.current_app = admin.admin_site.name
        return TemplateResponse(request, template, context)

    def _actions(self, request: HttpRequest, obj: Any) -> list[Any]:
        admin: Any = self
        offered = [name for name in admin.actions_detail if name in self.offered(obj)]
        allowed = admin.get_actions_detail(request, obj.pk)
        found: list[Any] = admin._get_actions_navigation(offered, allowed, quote(obj.pk))
        return found


class ReasonForm(BaseDialogForm):
    """Asks why, before something is done that the audit trail keeps."""

    reason = forms.CharField(
        max_length=500, widget=UnfoldAdminTextInputWidget, help_text="Kept in the audit trail."
    )


class Reasoned:
    """Actions on the page of a row that ask for a reason and leave it in the audit trail."""

    def do(
        self,
        request: HttpRequest,
        form: Any,
        object_id: str,
        name: str,
        deed: Callable[[Any], bool],
        *,
        done_text: str = "done",
    ) -> HttpResponse:
        """Have `deed` done to the row, which tells whether it changed anything, and go back to it.
        `done_text`: what was done, where `name` does not say it."""
        admin: Any = self
        row = admin.get_object(request, unquote(object_id))
        if row is None or not admin.has_view_permission(request, row):
            raise Http404
        with transaction.atomic():
            done = deed(row)
            result = done_text if done else "there was nothing to do"
            audit.note(request, name, row, form.cleaned_data["reason"], result)
        level = messages.SUCCESS if done else messages.WARNING
        admin.message_user(request, f"{name.capitalize()} of {row}: {result}.", level)
        meta = admin.opts
        page = reverse(f"admin:{meta.app_label}_{meta.model_name}_change", args=[quote(row.pk)])
        return back_to(request, page)


def dialog(title: str, description: str, submit: str) -> Any:
    return {
        "title": title,
        "description": description,
        "form_class": ReasonForm,
        "form_submit_text": submit,
    }


def back_to(request: HttpRequest, url: str) -> HttpResponse:
    """Where a dialog leads: htmx must be told to leave the page."""
    if request.headers.get("HX-Request"):
        return HttpResponse(headers={"HX-Redirect": url})
    return HttpResponseRedirect(url)
