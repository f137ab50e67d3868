from typing import Any, cast

from axes.utils import reset as axes_reset
from django import forms
from django.contrib import admin
from django.contrib.admin.utils import unquote
from django.contrib.auth.admin import GroupAdmin, UserAdmin
from django.contrib.auth.models import Group
from django.core.exceptions import PermissionDenied
from django.db.models import Count, Exists, Max, Model, OuterRef, QuerySet, Subquery, Sum
from django.db.models.functions import Coalesce
from django.http import HttpRequest, HttpResponse
from django.urls import reverse
from django.utils.html import format_html
from unfold.decorators import action, display
from unfold.enums import ActionVariant
from unfold.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm

from botrunner.activity import with_activity
from chat.models import Thread
from console import audit, matrix, refusals
from console.base import (
    ConsoleAdmin,
    EmptyState,
    Inline,
    ReasonMixin,
    SwitchMixin,
    dialog,
    may_read,
    switch_action,
)
from realm import authority, commands
from realm.filters import InvalidFilter
from realm.models import BotCommand, BotRegistration, User

admin.site.unregister(Group)


class RankMixin:
    """An admin of users or groups. On every page and in every action it refuses to change a row that
    has more rights than the caller (realm/authority.py)."""

    # The field that grants rights.
    grants = ""

    def objection(self, request: HttpRequest, obj: Any) -> str:
        raise NotImplementedError

    def grantable(self, request: HttpRequest) -> QuerySet[Any]:
        """Return the rows that `grants` may refer to."""
        raise NotImplementedError

    def _may_touch(self, request: HttpRequest, obj: Any) -> bool:
        if obj is None or not (reason := self.objection(request, obj)):
            return True
        refusals.note(request, obj, reason)
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        may: bool = super().has_change_permission(request, obj)  # type: ignore[misc]
        return may and self._may_touch(request, obj)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        may: bool = super().has_delete_permission(request, obj)  # type: ignore[misc]
        return may and self._may_touch(request, obj)

    def formfield_for_manytomany(self, db_field: Any, request: Any = None, **kwargs: Any) -> Any:
        field: Any = super().formfield_for_manytomany(db_field, request, **kwargs)  # type: ignore[misc]
        if field is not None and db_field.name == self.grants:
            field.queryset = field.queryset.filter(pk__in=self.grantable(request).values("pk"))
        return field

    def changeform_view(
        self,
        request: HttpRequest,
        object_id: str | None = None,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> HttpResponse:
        granted = request.POST.getlist(self.grants)
        if granted and authority.not_grantable(self.grantable(request), granted):
            obj = self.get_object(request, unquote(object_id)) if object_id else None  # type: ignore[attr-defined]
            if self._may_touch(request, obj):
                refusals.note(
                    request,
                    obj or self.model,  # type: ignore[attr-defined]
                    "You can only grant permissions that you hold yourself.",
                )
            raise PermissionDenied
        page: HttpResponse = super().changeform_view(request, object_id, form_url, extra_context)  # type: ignore[misc]
        return page


@admin.register(Group)
class RealmGroupAdmin(RankMixin, GroupAdmin, ConsoleAdmin):
    empty = EmptyState("Create the groups Viewer, Operator and Admin:", "python manage.py migrate")
    grants = "permissions"

    def objection(self, request: HttpRequest, obj: Any) -> str:
        return authority.group_objection(_actor(request), obj)

    def grantable(self, request: HttpRequest) -> QuerySet[Any]:
        return authority.held_by(_actor(request))


def _actor(request: HttpRequest) -> User:
    return cast(User, request.user)


def _aggregate(model: type[Model], owner: str, figure: Any) -> Subquery:
    """Aggregate the rows of `model` that belong to a row of a list. The database runs a subquery only
    for the rows of a page; it would compute a joined aggregate for every counted row."""
    rows = model._default_manager.filter(**{owner: OuterRef("pk")}).order_by().values(owner)
    return Subquery(rows.annotate(figure=figure).values("figure"))


@admin.register(User)
class RealmUserAdmin(ReasonMixin, RankMixin, UserAdmin, ConsoleAdmin):
    empty = EmptyState("Create the first user:", "python manage.py createsuperuser")
    form = UserChangeForm
    add_form = UserCreationForm
    change_password_form = AdminPasswordChangeForm
    list_display = [
        "username",
        "matrix_user_id",
        "roles",
        "messages",
        "last_active",
        "registrations",
        "last_login",
        "date_joined",
    ]
    list_filter = ["is_staff", "is_superuser", "is_active", "groups"]
    search_fields = ["=username", "=matrix_user_id", "^email"]
    fieldsets = [
        *(UserAdmin.fieldsets or []),
        ("Matrix", {"fields": ["matrix_user_id", "tokens_valid_from"]}),
    ]
    actions_detail = ("revoke_tokens",)
    grants = "groups"

    def objection(self, request: HttpRequest, obj: Any) -> str:
        return authority.objection(_actor(request), obj)

    def grantable(self, request: HttpRequest) -> QuerySet[Any]:
        return authority.grantable_groups(_actor(request))

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        """Keep user managers from raising their own rights."""
        fields = [*super().get_readonly_fields(request, obj), "tokens_valid_from"]
        if request.user.is_superuser:
            return fields
        # A Matrix id gives access to the rooms of that person.
        return [*fields, "is_superuser", "user_permissions", "matrix_user_id"]

    def get_queryset(self, request: HttpRequest) -> QuerySet[User]:
        return (
            super()
            .get_queryset(request)
            .prefetch_related("groups")
            .annotate(
                turn_count=_aggregate(Thread, "owner", Sum("turns")),
                active_at=_aggregate(Thread, "owner", Max("updated_at")),
                bot_count=_aggregate(BotRegistration, "user", Count("pk")),
            )
        )

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        """Save the account, and revoke its tokens if its Matrix id changed: they were issued to the
        previous holder of that id."""
        super().save_model(request, obj, form, change)
        if "matrix_user_id" in form.changed_data:
            obj.revoke_tokens()

    @admin.display
    def roles(self, user: User) -> str:
        names = [group.name for group in user.groups.all()]
        return ", ".join(["superuser"] * user.is_superuser + names)

    @admin.display
    def messages(self, user: Any) -> int:
        return user.turn_count or 0

    @admin.display
    def last_active(self, user: Any) -> Any:
        return user.active_at

    @admin.display
    def registrations(self, user: Any) -> str:
        if not user.bot_count:
            return ""
        url = reverse("admin:realm_botregistration_changelist")
        return format_html('<a href="{}?user__id__exact={}">{}</a>', url, user.pk, user.bot_count)

    actions = ["unlock_login"]

    @admin.action(description="Unlock login", permissions=["change"])
    def unlock_login(self, request: HttpRequest, users: QuerySet[User]) -> None:
        """Unlock accounts after too many wrong passwords. Allowed for every account: it changes none,
        and others may have locked it."""
        for user in users:
            removed = axes_reset(username=user.username)
            audit.record(
                request,
                audit.Action.CHANGE,
                user,
                result=f"Login unlocked ({removed} locks removed).",
            )
        self.message_user(request, "Login unlocked.")

    def has_revoke_permission(self, request: HttpRequest, object_id: Any = "") -> bool:
        user = self.get_object(request, unquote(str(object_id)))
        return user is not None and self.has_change_permission(request, user)

    @action(
        description="Revoke API tokens",
        permissions=["revoke"],
        variant=ActionVariant.DANGER,
        icon="key_off",
        url_path="revoke-tokens",
        dialog=dialog(
            "Revoke all API tokens of this user?",
            "Every token issued until now stops working; new ones can be issued. Browser sessions "
            "stay valid until the password changes.",
            "Revoke",
        ),
    )
    def revoke_tokens(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        def revoke(user: User) -> bool:
            user.revoke_tokens()
            return True

        return self.perform(
            request, form, object_id, audit.Action.CHANGE, revoke, result="all API tokens revoked"
        )


class BotRegistrationForm(forms.ModelForm):
    def clean_user(self) -> User:
        user: User = self.cleaned_data["user"]
        if not user.matrix_user_id:
            raise forms.ValidationError("This user has no Matrix user ID.")
        return user


class BotCommandForm(forms.ModelForm):
    # Set by the admin: the permission to read other users' messages.
    may_read = False

    def clean(self) -> dict[str, Any] | None:
        """Require for a command that posts to a URL the same permission as for a webhook's URL: both
        send other people's messages there."""
        cleaned: dict[str, Any] | None = super().clean()
        names = {self.initial.get("command"), self.cleaned_data.get("command")} - {None}
        if not self.may_read and self.has_changed() and names - commands.COMMANDS.keys():
            raise forms.ValidationError(
                "This command sends messages to a URL, which requires the permission to read messages "
                "of others. Ask an admin who has it."
            )
        return cleaned

    def clean_command(self) -> str:
        command: str = self.cleaned_data["command"]
        try:
            commands.check(command)
        except commands.UnknownCommand as error:
            raise forms.ValidationError(str(error)) from None
        return command


class BotCommandInline(Inline):
    model = BotCommand
    form = BotCommandForm
    fields = ["command", "in_words", "filter", "created_at"]
    readonly_fields = ["in_words", "created_at"]

    def get_formset(self, request: HttpRequest, obj: Any = None, **kwargs: Any) -> Any:
        formset: Any = super().get_formset(request, obj, **kwargs)
        formset.form.may_read = may_read(request, None)
        return formset

    def formfield_for_dbfield(self, db_field: Any, request: HttpRequest, **kwargs: Any) -> Any:
        field = super().formfield_for_dbfield(db_field, request, **kwargs)
        if db_field.name == "filter":
            field.widget.attrs["rows"] = 4
        return field

    @admin.display(description="triggered by")
    def in_words(self, command: BotCommand) -> str:
        try:
            return command.when.in_words()
        except InvalidFilter as error:
            return f"never: {error}"


class CommandFilter(admin.SimpleListFilter):
    """Registrations that have a command. Uses a subquery: a join would need DISTINCT, which computes
    the annotations of every counted row."""

    title = "command"
    parameter_name = "commands__command"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        names = BotCommand.objects.order_by("command").values_list("command", flat=True)
        return [(name, name) for name in names.distinct()]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        if self.value() is None:
            return queryset
        fires = BotCommand.objects.filter(registration=OuterRef("pk"), command=self.value())
        return queryset.filter(Exists(fires))


@admin.register(BotRegistration)
class BotRegistrationAdmin(SwitchMixin, ConsoleAdmin):
    empty = EmptyState("Register a bot here, or from a shell:", "scripts/register-bot.sh")
    form = BotRegistrationForm
    list_display = [
        "username",
        "state",
        "command_count",
        "rooms_lately",
        "runs_lately",
        "failures_lately",
        "last_fired_at",
        "created_at",
    ]
    list_filter = ["enabled", "created_at", CommandFilter]
    search_fields = ["=id", "=username", "=user__username"]
    ordering = ["-created_at"]
    fields = ["user", "username", "id", "created_at"]
    autocomplete_fields = ["user"]
    inlines = [BotCommandInline]
    actions_detail = ("enable", "disable")
    change_form_outer_before_template = "console/registration_state.html"
    change_form_outer_after_template = "console/registration_events.html"

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        """Keep the owner of an existing registration read-only."""
        return ["username", "id", "created_at", *(["user"] if obj else [])]

    def get_queryset(self, request: HttpRequest) -> QuerySet[BotRegistration]:
        command_count = _aggregate(BotCommand, "registration", Count("pk"))
        rows = super().get_queryset(request).annotate(command_count=Coalesce(command_count, 0))
        return with_activity(rows)

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        if not change:
            obj.username = obj.user.matrix_user_id
        super().save_model(request, obj, form, change)

    def changeform_view(
        self,
        request: HttpRequest,
        object_id: str | None = None,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> Any:
        extra: dict[str, Any] = {}
        registration = self.get_object(request, unquote(object_id)) if object_id else None
        if registration:
            extra = {"registration": registration, "events": matrix.recent_events(registration)}
        return super().changeform_view(
            request, object_id, form_url, {**(extra_context or {}), **extra}
        )

    @display(description="state", label={"enabled": "success", "disabled": "danger"})
    def state(self, registration: BotRegistration) -> str:
        return "enabled" if registration.enabled else "disabled"

    @admin.display(description="commands", ordering="command_count")
    def command_count(self, registration: Any) -> int:
        return registration.command_count

    @admin.display(description="rooms (24 h)")
    def rooms_lately(self, registration: Any) -> int:
        return int(registration.rooms_lately)

    @admin.display(description="runs (24 h)", ordering="runs_lately")
    def runs_lately(self, registration: Any) -> int:
        return int(registration.runs_lately)

    @admin.display(description="failures (24 h)", ordering="failures_lately")
    def failures_lately(self, registration: Any) -> int:
        return int(registration.failures_lately)

    @admin.display(description="last fired", ordering="last_fired_at", empty_value="never")
    def last_fired_at(self, registration: Any) -> Any:
        return registration.last_fired_at

    enable = switch_action(
        "enable", "Enable this registration?", "New messages trigger its commands again."
    )
    disable = switch_action(
        "disable",
        "Disable this registration?",
        "Its commands trigger nothing until it is enabled again; the API shows this to its owner. "
        "Runs that were already submitted continue.",
    )


@admin.register(BotCommand)
class BotCommandAdmin(ConsoleAdmin):
    empty = EmptyState("A bot without commands never answers. Add a command to a registration.")
    form = BotCommandForm
    list_display = ["id", "command", "in_words", "registration", "created_at"]
    list_filter = ["created_at", "command"]
    list_select_related = ["registration"]
    search_fields = ["=id", "=command", "=registration__id", "=registration__username"]
    ordering = ["-created_at"]
    fields = ["registration", "command", "filter", "id", "created_at"]
    readonly_fields = ["id", "created_at"]
    autocomplete_fields = ["registration"]

    def get_form(self, request: HttpRequest, obj: Any = None, **kwargs: Any) -> Any:
        form: Any = super().get_form(request, obj, **kwargs)
        form.may_read = may_read(request, None)
        return form
