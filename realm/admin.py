from typing import Any

from django import forms
from django.contrib import admin
from django.contrib.auth.admin import UserAdmin
from django.db.models import Count, QuerySet
from django.http import HttpRequest

from agents import commands
from realm.models import BotCommand, BotRegistration, User


@admin.register(User)
class RealmUserAdmin(UserAdmin):
    list_display = ["username", "matrix_user_id", "is_staff", "date_joined"]
    search_fields = ["=username", "=matrix_user_id", "^email"]
    fieldsets = [
        *(UserAdmin.fieldsets or []),
        ("Matrix", {"fields": ["matrix_user_id"]}),
    ]


class BotRegistrationForm(forms.ModelForm):
    def clean_user(self) -> User:
        user: User = self.cleaned_data["user"]
        if not user.matrix_user_id:
            raise forms.ValidationError("This user has no Matrix id.")
        return user


class BotCommandForm(forms.ModelForm):
    def clean_command(self) -> str:
        command: str = self.cleaned_data["command"]
        try:
            commands.check(command)
        except commands.UnknownCommand as error:
            raise forms.ValidationError(str(error)) from None
        return command


class BotCommandInline(admin.TabularInline):
    model = BotCommand
    form = BotCommandForm
    fields = ["command", "filter", "id", "created_at"]
    readonly_fields = ["id", "created_at"]
    extra = 0


@admin.register(BotRegistration)
class BotRegistrationAdmin(admin.ModelAdmin):
    form = BotRegistrationForm
    list_display = ["id", "username", "command_count", "created_at"]
    list_filter = ["created_at", "commands__command"]
    search_fields = ["=id", "=username"]
    ordering = ["-created_at"]
    show_full_result_count = False
    fields = ["user", "username", "id", "created_at"]
    autocomplete_fields = ["user"]
    inlines = [BotCommandInline]

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        """A bot does not change hands."""
        return ["username", "id", "created_at", *(["user"] if obj else [])]

    def get_queryset(self, request: HttpRequest) -> QuerySet[BotRegistration]:
        return super().get_queryset(request).annotate(command_count=Count("commands"))

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        if not change:
            obj.username = obj.user.matrix_user_id
        super().save_model(request, obj, form, change)

    @admin.display(description="commands", ordering="command_count")
    def command_count(self, registration: Any) -> int:
        return registration.command_count


@admin.register(BotCommand)
class BotCommandAdmin(admin.ModelAdmin):
    form = BotCommandForm
    list_display = ["id", "command", "event_type", "registration", "created_at"]
    list_filter = ["created_at", "command"]
    list_select_related = ["registration"]
    search_fields = ["=id", "=command", "=registration__id", "=registration__username"]
    ordering = ["-created_at"]
    show_full_result_count = False
    fields = ["registration", "command", "filter", "id", "created_at"]
    readonly_fields = ["id", "created_at"]
    autocomplete_fields = ["registration"]

    @admin.display(ordering="filter__event_type")
    def event_type(self, command: BotCommand) -> str:
        return command.when.event_type
