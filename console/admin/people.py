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
from unfold.decorators import action
from unfold.enums import ActionVariant
from unfold.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm

from chat.models import Thread
from console import audit, refused
from console.base import ConsoleAdmin, Empty, Inline, Reasoned, dialog, may_read
from realm import authority, commands
from realm.models import BotCommand, BotRegistration, User

admin.site.unregister(Group)


class Ranked:
    """An admin of users or groups: refuses to change what has more rights than the sender of a request
    (realm/authority.py), on every page and in every action."""

    # The field that grants rights.
    grants = ""

    def objection(self, request: HttpRequest, obj: Any) -> str:
        raise NotImplementedError

    def grantable(self, request: HttpRequest) -> QuerySet[Any]:
        """The rows that `grants` may name."""
        raise NotImplementedError

    def _may_touch(self, request: HttpRequest, obj: Any) -> bool:
        if obj is None or not (why_not := self.objection(request, obj)):
            return True
        refused.note(request, obj, why_not)
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
        asked = request.POST.getlist(self.grants)
        if asked and authority.not_grantable(self.grantable(request), asked):
            obj = self.get_object(request, unquote(object_id)) if object_id else None  # type: ignore[attr-defined]
            if self._may_touch(request, obj):
                refused.note(
                    request,
                    obj or self.model,  # type: ignore[attr-defined]
                    f"You can grant only {self.grants} of which you hold every permission yourself.",
                )
            raise PermissionDenied
        page: HttpResponse = super().changeform_view(request, object_id, form_url, extra_context)  # type: ignore[misc]
        return page


@admin.register(Group)
class RealmGroupAdmin(Ranked, GroupAdmin, ConsoleAdmin):
    empty = Empty("Viewer, Operator and Admin are made by:", "python manage.py migrate")
    grants = "permissions"

    def objection(self, request: HttpRequest, obj: Any) -> str:
        return authority.group_objection(_actor(request), obj)

    def grantable(self, request: HttpRequest) -> QuerySet[Any]:
        return authority.held_by(_actor(request))


def _actor(request: HttpRequest) -> User:
    return cast(User, request.user)


def _of_own(model: type[Model], owner: str, figure: Any) -> Subquery:
    """What the rows of `model` that belong to a row of a list come to. By a subquery, which is carried
    out for the rows of a page alone; an aggregate of the list itself is for all that are counted."""
    mine = model._default_manager.filter(**{owner: OuterRef("pk")}).order_by().values(owner)
    return Subquery(mine.annotate(figure=figure).values("figure"))


@admin.register(User)
class RealmUserAdmin(Reasoned, Ranked, UserAdmin, ConsoleAdmin):
    empty = Empty("Make the first one:", "python manage.py createsuperuser")
    form = UserChangeForm
    add_form = UserCreationForm
    change_password_form = AdminPasswordChangeForm
    list_display = [
        "username",
        "matrix_user_id",
        "roles",
        "questions",
        "last_asked",
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
        """Whoever may manage users shall not be able to become more than that."""
        fields = [*super().get_readonly_fields(request, obj), "tokens_valid_from"]
        if request.user.is_superuser:
            return fields
        # With a Matrix id comes what that person may read: the rooms they are in.
        return [*fields, "is_superuser", "user_permissions", "matrix_user_id"]

    def get_queryset(self, request: HttpRequest) -> QuerySet[User]:
        return (
            super()
            .get_queryset(request)
            .prefetch_related("groups")
            .annotate(
                asked=_of_own(Thread, "owner", Sum("turns")),
                asked_at=_of_own(Thread, "owner", Max("updated_at")),
                bots=_of_own(BotRegistration, "user", Count("pk")),
            )
        )

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        """The tokens of a Matrix id were issued to the account that had it before."""
        super().save_model(request, obj, form, change)
        if "matrix_user_id" in form.changed_data:
            obj.revoke_tokens()

    @admin.display
    def roles(self, user: User) -> str:
        names = [group.name for group in user.groups.all()]
        return ", ".join(["superuser"] * user.is_superuser + names)

    @admin.display(description="questions")
    def questions(self, user: Any) -> int:
        return user.asked or 0

    @admin.display(description="last seen")
    def last_asked(self, user: Any) -> Any:
        return user.asked_at

    @admin.display
    def registrations(self, user: Any) -> str:
        if not user.bots:
            return ""
        url = reverse("admin:realm_botregistration_changelist")
        return format_html('<a href="{}?user__id__exact={}">{}</a>', url, user.pk, user.bots)

    actions = ["let_in"]

    @admin.action(description="Let log in again", permissions=["change"])
    def let_in(self, request: HttpRequest, users: QuerySet[User]) -> None:
        """After too many wrong passwords. Of anybody: it changes no account, and is the remedy where
        others have locked one out."""
        for user in users:
            forgotten = axes_reset(username=user.username)
            audit.note(
                request, audit.Action.CHANGE, user, result=f"Let log in again ({forgotten} locks)."
            )
        self.message_user(request, "They may log in again.")

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
            "Every token that was issued until now is refused, wherever it is; new ones can be had. "
            "Sessions in a browser stay: a new password ends them.",
            "Revoke",
        ),
    )
    def revoke_tokens(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        def deed(user: User) -> bool:
            user.revoke_tokens()
            return True

        return self.do(
            request, form, object_id, audit.Action.CHANGE, deed, done_text="all API tokens revoked"
        )


class BotRegistrationForm(forms.ModelForm):
    def clean_user(self) -> User:
        user: User = self.cleaned_data["user"]
        if not user.matrix_user_id:
            raise forms.ValidationError("This user has no Matrix id.")
        return user


class BotCommandForm(forms.ModelForm):
    # Whether the sender of the form may read what others say.
    may_read = False

    def clean(self) -> dict[str, Any] | None:
        """What is changed of a command that posts to a URL takes the same right as a webhook's URL:
        words of others go there."""
        cleaned: dict[str, Any] | None = super().clean()
        given = {self.initial.get("command"), self.cleaned_data.get("command")} - {None}
        if not self.may_read and self.has_changed() and given - commands.COMMANDS.keys():
            raise forms.ValidationError(
                "This command sends what people say to a URL. That takes the permission to read what "
                "others said; ask somebody who has it."
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
    fields = ["command", "filter", "id", "created_at"]
    readonly_fields = ["id", "created_at"]

    def get_formset(self, request: HttpRequest, obj: Any = None, **kwargs: Any) -> Any:
        formset: Any = super().get_formset(request, obj, **kwargs)
        formset.form.may_read = may_read(request, None)
        return formset


class FiresFilter(admin.SimpleListFilter):
    """Those with a command. By a subquery: a join would have to be made distinct, which takes all that
    a list tells of each row, and of those that are only counted too."""

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
class BotRegistrationAdmin(ConsoleAdmin):
    empty = Empty("Register a bot here, or from a shell:", "scripts/register-bot.sh")
    form = BotRegistrationForm
    list_display = ["id", "username", "enabled", "command_count", "created_at"]
    list_filter = ["created_at", FiresFilter]
    search_fields = ["=id", "=username"]
    ordering = ["-created_at"]
    fields = ["user", "username", "id", "created_at"]
    autocomplete_fields = ["user"]
    inlines = [BotCommandInline]

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        """A bot does not change hands."""
        return ["username", "id", "created_at", *(["user"] if obj else [])]

    def get_queryset(self, request: HttpRequest) -> QuerySet[BotRegistration]:
        counted = _of_own(BotCommand, "registration", Count("pk"))
        return super().get_queryset(request).annotate(command_count=Coalesce(counted, 0))

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        if not change:
            obj.username = obj.user.matrix_user_id
        super().save_model(request, obj, form, change)

    @admin.display(description="commands", ordering="command_count")
    def command_count(self, registration: Any) -> int:
        return registration.command_count


@admin.register(BotCommand)
class BotCommandAdmin(ConsoleAdmin):
    empty = Empty("Without commands a bot answers nothing. Add one to a registration.")
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
