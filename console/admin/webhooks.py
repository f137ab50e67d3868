from typing import Any

from django import forms
from django.contrib import admin
from django.contrib.admin.utils import unquote
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect
from django.urls import reverse
from django.utils.html import format_html
from unfold.decorators import action, display
from unfold.enums import ActionVariant

from chat.models import Thread
from console import audit, bulk
from console.base import (
    Bodies,
    ConsoleAdmin,
    Empty,
    Period,
    ReadOnlyAdmin,
    Reasoned,
    dialog,
    may_read,
)
from realm.models import User
from webhooks.models import Delivery, Subscription

# Where a session keeps which webhook has a new secret, until the page that shows it. Not the secret:
# sessions are kept unencrypted.
NEW_SECRET = "webhooks.new_secret"  # noqa: S105
LABELS = {"sent": "success", "sending": "info", "failed": "warning", "dead": "danger"}


class SubscriptionForm(forms.ModelForm):
    # Whose it is, or will be: its rules depend on that.
    owner: User

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.instance.owner = self.owner


@admin.register(Subscription)
class SubscriptionAdmin(Reasoned, ConsoleAdmin):
    empty = Empty(
        "Add a URL that is to be told how runs end; docs/how-to/receive-webhooks.md says what it gets."
    )
    form = SubscriptionForm
    list_display = ["host", "state", "owner", "registration", "failing_since", "created_at"]
    list_filter = ["enabled"]
    list_select_related = ["owner", "registration"]
    search_fields = ["=id", "=owner__username", "=registration__id"]
    ordering = ["-created_at"]
    asked = ["url", "registration", "on_completed", "on_failed", "on_cancelled"]
    told = [
        "owner",
        "signing_secret",
        "enabled",
        "disabled_reason",
        "failing_since",
        "delivered",
        "id",
        "created_at",
    ]
    autocomplete_fields = ["registration"]
    actions_detail = ("enable", "disable", "rotate")
    change_form_outer_before_template = "webhooks/new_secret.html"

    def lookup_allowed(self, lookup: str, value: Any, request: HttpRequest) -> bool:
        """No secret is to be guessed letter by letter, nor a URL, which may hold one."""
        if lookup.partition("__")[0] in ("secret", "old_secret", "url"):
            return False
        return bool(super().lookup_allowed(lookup, value, request))

    def has_change_permission(self, request: HttpRequest, obj: Subscription | None = None) -> bool:
        """Whoever says where the words of others go must be allowed to read them."""
        may_change = super().has_change_permission(request, obj)
        return may_change and (obj is None or may_read(request, obj.owner_id))

    def get_fields(self, request: HttpRequest, obj: Subscription | None = None) -> list[str]:
        if obj is None:
            return self.asked
        may_change = self.has_change_permission(request, obj)
        return ["url" if may_change else "host", *self.asked[1:], *self.told]

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        return ["host", *self.told]

    def get_deleted_objects(self, objs: Any, request: HttpRequest) -> Any:
        """With how many deliveries, and not each by its name: there may be a million."""
        webhooks = list(objs)
        deliveries = Delivery.objects.filter(subscription__in=webhooks).count()
        counts = {"webhooks": len(webhooks), "deliveries": deliveries}
        return [str(each) for each in webhooks], counts, set(), []

    def get_form(self, request: HttpRequest, obj: Any = None, **kwargs: Any) -> Any:
        form: Any = super().get_form(request, obj, **kwargs)
        form.owner = obj.owner if obj else request.user
        return form

    def response_add(self, request: HttpRequest, obj: Any, post_url_continue: Any = None) -> Any:
        """To its page, which shows the secret."""
        _show_once(request, obj)
        return redirect("admin:webhooks_subscription_change", obj.pk)

    def changeform_view(
        self,
        request: HttpRequest,
        object_id: str | None = None,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> Any:
        extra = dict(extra_context or {})
        kept = request.session.get(NEW_SECRET, {})
        if request.method == "GET" and object_id and kept.get("id") == unquote(object_id):
            del request.session[NEW_SECRET]
            if made := Subscription.objects.filter(pk=kept["id"]).first():
                extra["new_secret"] = made.secret
        return super().changeform_view(request, object_id, form_url, extra)

    def get_actions_detail(self, request: HttpRequest, object_id: Any) -> list[Any]:
        subscription = Subscription.objects.filter(pk=unquote(str(object_id))).first()
        idle = "enable" if subscription is None or subscription.enabled else "disable"
        return [
            each
            for each in super().get_actions_detail(request, object_id)
            if not each.action_name.endswith(f"_{idle}")
        ]

    @admin.display(description="receiver", ordering="url")
    def host(self, subscription: Subscription) -> str:
        return subscription.host

    @display(description="state", label={"enabled": "success", "disabled": "danger"})
    def state(self, subscription: Subscription) -> str:
        return "enabled" if subscription.enabled else "disabled"

    @admin.display
    def signing_secret(self, subscription: Subscription) -> str:
        until = subscription.old_secret_until
        old = f", and the one before it until {until:%Y-%m-%d %H:%M} UTC" if until else ""
        return f"whsec_••••{old if subscription.is_rotating else ''}"

    @admin.display(description="deliveries")
    def delivered(self, subscription: Subscription) -> str:
        deliveries = reverse("admin:webhooks_delivery_changelist")
        url = f"{deliveries}?subscription__id__exact={subscription.pk}"
        return format_html('<a href="{}">All of them</a>', url)

    def has_switch_permission(self, request: HttpRequest, object_id: str = "") -> bool:
        return request.user.has_perm("webhooks.switch_subscription")

    def has_rotate_permission(self, request: HttpRequest, object_id: str = "") -> bool:
        found = Subscription.objects.filter(pk=unquote(str(object_id))).first()
        return found is not None and self.has_change_permission(request, found)

    @action(
        description="Disable",
        permissions=["switch"],
        variant=ActionVariant.DANGER,
        icon="pause_circle",
        url_path="disable",
        dialog=dialog(
            "Disable this webhook?",
            "Nothing is sent until it is enabled again. What waits then goes on; outcomes of the time "
            "in between are not told.",
            "Disable",
        ),
    )
    def disable(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        reason = form.cleaned_data["reason"]

        def deed(subscription: Subscription) -> bool:
            return subscription.disable(reason)

        return self.do(request, form, object_id, audit.Action.DISABLE, deed)

    @action(
        description="Enable",
        permissions=["switch"],
        variant=ActionVariant.PRIMARY,
        icon="play_circle",
        url_path="enable",
        dialog=dialog("Enable this webhook?", "What waits is sent, and what comes.", "Enable"),
    )
    def enable(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        return self.do(request, form, object_id, audit.Action.ENABLE, Subscription.enable)

    @action(
        description="Rotate the secret",
        permissions=["rotate"],
        icon="key",
        url_path="rotate",
        dialog=dialog(
            "Make a new secret?",
            "It is shown once. For a day both the new and the present one sign each delivery.",
            "Rotate",
        ),
    )
    def rotate(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        def deed(subscription: Subscription) -> bool:
            subscription.rotate()
            _show_once(request, subscription)
            return True

        return self.do(request, form, object_id, audit.Action.ROTATE, deed)


def _show_once(request: HttpRequest, subscription: Subscription) -> None:
    """On the next page of it that whoever asked for it sees."""
    request.session[NEW_SECRET] = {"id": str(subscription.pk)}


@admin.register(Delivery)
class DeliveryAdmin(Reasoned, Bodies, ReadOnlyAdmin):
    empty = Empty("Each outcome that a webhook is told of stands here. Add a webhook first.")
    bodies = {"body": "event.body"}
    list_display = [
        "type",
        "state",
        "receiver",
        "run",
        "attempts",
        "status_code",
        "error",
        "next_try_at",
        "created_at",
    ]
    list_filter = ["status", Period]
    list_select_related = ["subscription", "run__thread"]
    search_fields = ["=event__id", "=run__id"]
    ordering = ["-created_at", "id"]
    fields = [
        "subscription",
        "run",
        "type",
        "event_id",
        "status",
        "attempts",
        "next_try_at",
        "status_code",
        "error",
        "body",
        "created_at",
        "tried_at",
        "sent_at",
    ]
    actions_detail = ("resend",)

    def lookup_allowed(self, lookup: str, value: Any, request: HttpRequest) -> bool:
        # The page of a subscription links to its deliveries.
        of_one = lookup == "subscription__id__exact"
        return of_one or super().lookup_allowed(lookup, value, request)

    def has_delete_permission(self, request: HttpRequest, obj: Delivery | None = None) -> bool:
        """With whatever it belongs to, but not by itself."""
        page = request.resolver_match
        is_own = page is None or (page.url_name or "").startswith("webhooks_delivery_")
        return not is_own and request.user.has_perm("webhooks.delete_subscription")

    def thread_of(self, delivery: Delivery) -> Thread:
        return delivery.run.thread

    @admin.display
    def receiver(self, delivery: Delivery) -> str:
        return delivery.subscription.host

    @display(description="status", label=LABELS)
    def state(self, delivery: Delivery) -> str:
        return delivery.status

    def has_resend_permission(self, request: HttpRequest, object_id: str = "") -> bool:
        return request.user.has_perm("webhooks.resend_delivery")

    @action(
        description="Send again",
        permissions=["resend"],
        icon="replay",
        url_path="resend",
        dialog=dialog(
            "Send this once more?",
            "At once, under the same id, by which the receiver knows it; with all its tries.",
            "Send again",
        ),
    )
    def resend(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        return self.do(request, form, object_id, audit.Action.RESEND, Delivery.resend)


bulk.register(
    bulk.Deed(
        name="webhooks.resend_delivery",
        model=Delivery,
        title="Send again",
        action=audit.Action.RESEND,
        do=Delivery.resend,
        explanation="Each goes out once more, under its id, with all its tries. What is about to be "
        "sent, and what a disabled webhook is owed, is left as it is.",
        order="created_at",
    )
)
