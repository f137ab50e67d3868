"""Building blocks of the admin pages. No other module depends on the theme."""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

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
from unfold.admin import ModelAdmin, TabularInline
from unfold.decorators import action
from unfold.enums import ActionVariant
from unfold.forms import BaseDialogForm
from unfold.widgets import UnfoldAdminTextInputWidget

from console import audit, bulk, export
from console.paging import PagedMixin, PeriodFilter

__all__ = [
    "POST_MESSAGE",
    "ConsoleAdmin",
    "DetailPageMixin",
    "EmptyState",
    "Inline",
    "MaskedBodiesMixin",
    "PeriodFilter",
    "ReadOnlyAdmin",
    "ReasonMixin",
    "SwitchMixin",
    "body",
    "dialog",
    "may_read",
    "redirect_to",
    "switch_action",
]
PREVIEW_LENGTH = 80


def may_read(request: HttpRequest, owner: Any) -> bool:
    """Return whether the caller may read the messages of `owner`: a user, a user's id or None."""
    owner = getattr(owner, "pk", owner)
    return _is_caller(request, owner) or request.user.has_perm("chat.read_messages")


def _is_caller(request: HttpRequest, owner: Any) -> bool:
    return owner is not None and owner == request.user.pk


def body(request: HttpRequest, text: Any, owner: Any) -> str:
    """Return a text, or only its length if the caller may not read it."""
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
    """Return the attribute at a dotted path, such as `message.content` of a run."""
    for name in path.split("."):
        obj = getattr(obj, name, None)
    return obj


@dataclass(frozen=True)
class _MaskedField:
    """A column or form field that holds a body, for one request. Compared by value: Django reads the
    fields of a form and its excluded fields in two calls."""

    request: HttpRequest
    name: str
    path: str
    # The owner of the text, or the admin that returns the owner of each row.
    owner: Any
    limit: int | None = None

    def __call__(self, row: Any) -> str:
        owner = (
            self.owner.owner_of(row) if isinstance(self.owner, MaskedBodiesMixin) else self.owner
        )
        allowed = may_read(self.request, owner)
        if self.limit and hasattr(row, f"size_of_{self.name}"):
            # Annotated by `with_previews`.
            if not allowed:
                return _masked(getattr(row, f"size_of_{self.name}") or 0)
            text = getattr(row, f"preview_of_{self.name}") or ""
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


def _replaced(names: Any, fields: dict[str, Any]) -> list[Any]:
    return [fields.get(name, name) if isinstance(name, str) else name for name in names]


def with_previews(
    rows: QuerySet[Any], bodies: dict[str, str], shown: Collection[Any], *, whole: bool
) -> QuerySet[Any]:
    """Read only the beginning of the bodies that a list shows: a page has a hundred rows, each of up to
    a megabyte. `whole`: read the shown bodies completely, for an export."""
    columns = {name: path.replace(".", "__") for name, path in bodies.items()}
    needed = {columns[name] for name in columns if name in shown}
    rows = rows.defer(*({*columns.values()} - needed if whole else columns.values()))
    for name, column in columns.items():
        if name in shown and not whole:
            preview = Substr(column, 1, 4 * PREVIEW_LENGTH)
            rows = rows.annotate(
                **{f"preview_of_{name}": preview, f"size_of_{name}": Length(column)}
            )
    return rows


class MaskedBodiesMixin:
    """An admin whose rows hold people's messages. Lists and pages mask them for users without
    `chat.read_messages`; reading them leaves an audit entry."""

    # The name of a column or field and the path of its text: {"message": "message.content"}
    bodies: dict[str, str] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in cls.bodies:
            # Django's checks require an attribute; `get_list_display` replaces it.
            setattr(cls, name, None)

    def thread_of(self, obj: Any) -> Any:
        """Return the object that the audit entry of a reading refers to."""
        return obj.thread

    def owner_of(self, obj: Any) -> Any:
        """Return the id of the messages' owner. Called for each row of a list: set
        `list_select_related`."""
        return getattr(self.thread_of(obj), "owner_id", None)

    def lookup_allowed(self, lookup: str, value: Any, request: HttpRequest) -> bool:
        """Refuse filters on bodies: they would reveal a text letter by letter."""
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
        return with_previews(rows, self.bodies, shown, whole=request.method == "POST")

    def get_list_display(self, request: HttpRequest) -> list[Any]:
        names: Any = super().get_list_display(request)  # type: ignore[misc]
        return _replaced(
            names,
            {
                name: _MaskedField(request, name, path, self, PREVIEW_LENGTH)
                for name, path in self.bodies.items()
            },
        )

    def get_fields(self, request: HttpRequest, obj: Any = None) -> list[Any]:
        return _replaced(
            super().get_fields(request, obj),  # type: ignore[misc]
            self._masked_fields(request, obj),
        )

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[Any]:
        fields = self._masked_fields(request, obj)
        names: Any = super().get_readonly_fields(request, obj)  # type: ignore[misc]
        return [*_replaced(names, fields), *(each for each in fields.values() if each not in names)]

    def _masked_fields(self, request: HttpRequest, obj: Any) -> dict[str, Any]:
        owner = self.owner_of(obj) if obj is not None else None
        return {
            name: _MaskedField(request, name, path, owner) for name, path in self.bodies.items()
        }

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> HttpResponse:
        response: HttpResponse = super().changelist_view(request, extra_context)  # type: ignore[misc]
        shows = set(self.bodies) & {name for name in self.list_display if isinstance(name, str)}  # type: ignore[attr-defined]
        if shows and request.method == "GET" and may_read(request, None):
            model: Any = self.model  # type: ignore[attr-defined]
            audit.record_reading(request, model, f"the list, {request.GET.urlencode() or 'all'}")
        return response

    def render_change_form(
        self, request: HttpRequest, context: Any, *args: Any, obj: Any = None, **kwargs: Any
    ) -> HttpResponse:
        if obj is not None:
            self.record_reading(request, obj)
        page: HttpResponse = super().render_change_form(  # type: ignore[misc]
            request, context, *args, obj=obj, **kwargs
        )
        return page

    def record_reading(self, request: HttpRequest, obj: Any) -> None:
        """Write an audit entry if the caller reads another user's messages."""
        owner = self.owner_of(obj)
        if may_read(request, owner) and not _is_caller(request, owner):
            audit.record_reading(request, self.thread_of(obj))


class ReadOnlyMixin:
    """An admin of rows that only the system writes."""

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[Any]:
        # Django builds a form even for a read-only page, and has no form field for some columns.
        return list(getattr(self, "fields", None) or ())


@dataclass(frozen=True)
class EmptyState:
    """The hint that a list without rows shows: the next step, and a command for it."""

    text: str
    command: str = ""


POST_MESSAGE = """curl localhost:3000/api/chat/messages -d '{"content": "Hello"}'"""


class ConsoleAdmin(PagedMixin, ModelAdmin):
    empty = EmptyState("Nothing here yet.")
    search_help_text: Any = "Exact ID or name"
    list_per_page = 50
    list_fullwidth = True
    list_filter_submit = False
    compressed_fields = True

    def get_actions(self, request: HttpRequest) -> dict[str, Any]:
        actions: dict[str, Any] = super().get_actions(request)
        if self.actions is None or IS_POPUP_VAR in request.GET:
            return actions
        for bulk_action in bulk.actions_for(request, self.model):
            name = bulk_action.name.partition(".")[2]
            actions[name] = (partial(_confirm, bulk_action=bulk_action), name, bulk_action.title)
        if request.user.has_perm(export.PERMISSION):
            actions["export_csv"] = (_export, "export_csv", "Export as CSV")
        return actions

    def log_addition(self, request: HttpRequest, obj: Any, message: Any) -> LogEntry:
        entry: LogEntry = super().log_addition(request, obj, message)
        audit.record(request, audit.Action.ADD, obj, result=entry.get_change_message())
        return entry

    def log_change(self, request: HttpRequest, obj: Any, message: Any) -> LogEntry:
        entry: LogEntry = super().log_change(request, obj, message)
        audit.record(request, audit.Action.CHANGE, obj, result=entry.get_change_message())
        return entry

    def log_deletions(self, request: HttpRequest, queryset: QuerySet[Any]) -> Any:
        with transaction.atomic():
            for obj in queryset:
                audit.record(request, audit.Action.DELETE, obj)
            return super().log_deletions(request, queryset)


def _confirm(
    admin: ConsoleAdmin,
    request: HttpRequest,
    rows: QuerySet[Any],
    *,
    bulk_action: bulk.BulkAction,
) -> HttpResponse:
    """Show a confirmation page that asks for a reason; once there is one, start the bulk job."""
    reason = request.POST.get("reason", "").strip()
    if reason:
        job = bulk.start(request, bulk_action, rows, reason=reason)
        return redirect("admin:console_bulkjob_change", job.pk)
    context = {
        **admin.admin_site.each_context(request),
        "title": f"{bulk_action.title}: are you sure?",
        "opts": admin.opts,
        "bulk_action": bulk_action,
        "number": rows.count(),
        "action": request.POST["action"],
        "select_across": request.POST.get("select_across", "0"),
        "chosen": request.POST.getlist(ACTION_CHECKBOX_NAME),
        "reason_missing": "reason" in request.POST,
    }
    return TemplateResponse(request, "console/confirm_bulk.html", context)


def _export(admin: ConsoleAdmin, request: HttpRequest, rows: QuerySet[Any]) -> Any:
    columns = [
        replace(column, limit=None) if isinstance(column, _MaskedField) else column
        for column in admin.get_list_display(request)
        if column != "action_checkbox"
    ]
    return export.response(request, admin, rows, columns)


class Inline(TabularInline):
    extra = 0
    tab = False


class ReadOnlyAdmin(ReadOnlyMixin, ConsoleAdmin):
    def get_sortable_by(self, request: HttpRequest) -> list[str]:
        """Return the column that the list is ordered by: only this one has an index."""
        if self.sortable_by is not None:
            return list(self.sortable_by)
        return [name.removeprefix("-") for name in (self.ordering or ())[:1]]


class DetailPageMixin:
    """A detail page in place of Django's form, for a read-only row. `?live` returns the part that
    refreshes itself."""

    page_template = ""
    live_template = ""
    page_related: Sequence[str] = ()

    def page(self, request: HttpRequest, obj: Any) -> dict[str, Any]:
        """Return the templates' context, without the row and its actions."""
        raise NotImplementedError

    def offered(self, obj: Any) -> Collection[str]:
        """Return those of `actions_detail` that the state of the row allows."""
        return self.actions_detail  # type: ignore[attr-defined]

    def get_object(self, request: HttpRequest, object_id: str, from_field: Any = None) -> Any:
        queryset = self.get_queryset(request)  # type: ignore[attr-defined]
        try:
            pk = queryset.model._meta.pk.to_python(object_id)
        except ValidationError:
            return None
        if "\0" in object_id:  # PostgreSQL's driver refuses it
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
        if isinstance(self, MaskedBodiesMixin):
            self.record_reading(request, obj)
        is_live = "live" in request.GET
        context = {
            **({} if is_live else admin.admin_site.each_context(request)),
            **(extra_context or {}),
            "opts": admin.opts,
            "original": obj,
            "title": str(obj),
            "owner": self.owner_of(obj) if isinstance(self, MaskedBodiesMixin) else None,
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
        actions: list[Any] = admin._get_actions_navigation(offered, allowed, quote(obj.pk))
        return actions


class ReasonForm(BaseDialogForm):
    """Asks for the reason that the audit trail records."""

    reason = forms.CharField(
        max_length=500, widget=UnfoldAdminTextInputWidget, help_text="Recorded in the audit trail."
    )


class ReasonMixin:
    """Actions on the page of a row that ask for a reason and record it in the audit trail."""

    def perform(
        self,
        request: HttpRequest,
        form: Any,
        object_id: str,
        name: str,
        change: Callable[[Any], bool],
        *,
        result: str = "done",
    ) -> HttpResponse:
        """Apply `change` to the row and redirect to its page. `change` returns whether it changed
        anything; `result` is the text for a row that did."""
        admin: Any = self
        row = admin.get_object(request, unquote(object_id))
        if row is None or not admin.has_view_permission(request, row):
            raise Http404
        with transaction.atomic():
            changed = change(row)
            text = result if changed else "there was nothing to do"
            audit.record(request, name, row, form.cleaned_data["reason"], text)
        level = messages.SUCCESS if changed else messages.WARNING
        admin.message_user(request, f"{name.capitalize()} of {row}: {text}.", level)
        meta = admin.opts
        page = reverse(f"admin:{meta.app_label}_{meta.model_name}_change", args=[quote(row.pk)])
        return redirect_to(request, page)


class SwitchMixin(ReasonMixin):
    """The permission and the choice of the actions `enable` and `disable` (`switch_action`)."""

    def get_actions_detail(self, request: HttpRequest, object_id: Any) -> list[Any]:
        admin: Any = self
        row = admin.model._default_manager.filter(pk=unquote(str(object_id))).first()
        unavailable = "enable" if row is None or row.enabled else "disable"
        actions: list[Any] = super().get_actions_detail(request, object_id)  # type: ignore[misc]
        return [each for each in actions if not each.action_name.endswith(f"_{unavailable}")]

    def has_switch_permission(self, request: HttpRequest, object_id: str = "") -> bool:
        meta = self.opts  # type: ignore[attr-defined]
        return request.user.has_perm(f"{meta.app_label}.switch_{meta.model_name}")


def switch_action(name: Literal["enable", "disable"], title: str, description: str) -> Any:
    """Make one of the two actions of a `SwitchMixin`, for rows whose query set has `enable()` and
    `disable(reason)`."""
    enables = name == "enable"

    def perform(self: Any, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        reason = form.cleaned_data["reason"]

        def change(row: Any) -> bool:
            rows = self.model._default_manager.filter(pk=row.pk)
            return bool(rows.enable() if enables else rows.disable(reason))

        response: HttpResponse = self.perform(request, form, object_id, name, change)
        return response

    perform.__name__ = name
    return action(
        description=name.capitalize(),
        permissions=["switch"],
        variant=ActionVariant.PRIMARY if enables else ActionVariant.DANGER,
        icon="play_circle" if enables else "pause_circle",
        url_path=name,
        dialog=dialog(title, description, name.capitalize()),
    )(perform)


def dialog(title: str, description: str, submit: str) -> Any:
    return {
        "title": title,
        "description": description,
        "form_class": ReasonForm,
        "form_submit_text": submit,
    }


def redirect_to(request: HttpRequest, url: str) -> HttpResponse:
    """Redirect after a dialog; htmx needs a header of its own to leave the page."""
    if request.headers.get("HX-Request"):
        return HttpResponse(headers={"HX-Redirect": url})
    return HttpResponseRedirect(url)
