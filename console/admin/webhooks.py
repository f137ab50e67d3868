from typing import Any

from django import forms
from django.contrib import admin
from django.contrib.admin.utils import unquote
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect
from django.urls import reverse
from django.utils.html import format_html
from unfold.decorators import action, display

from chat.models import Thread
from console import audit, bulk
from console.base import (
    ConsoleAdmin,
    EmptyState,
    MaskedBodiesMixin,
    PeriodFilter,
    ReadOnlyAdmin,
    ReasonMixin,
    SwitchMixin,
    dialog,
    may_read,
    switch_action,
)
from realm.models import User
from webhooks.models import Delivery, Subscription

# Session key with the id of the webhook whose new secret the next page shows. The secret itself stays
# out of the session, which is stored unencrypted.
NEW_SECRET = "webhooks.new_secret"  # noqa: S105
LABELS = {"sent": "success", "sending": "info", "failed": "warning", "dead": "danger"}


class SubscriptionForm(forms.ModelForm):
    # Set by the admin: validation depends on the owner.
    owner: User

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.instance.owner = self.owner


@admin.register(Subscription)
class SubscriptionAdmin(SwitchMixin, ConsoleAdmin):
    empty = EmptyState(
        "Add a URL that receives the results of runs. See docs/how-to/receive-webhooks.md."
    )
    form = SubscriptionForm
    list_display = ["host", "state", "owner", "registration", "failing_since", "created_at"]
    list_filter = ["enabled"]
    list_select_related = ["owner", "registration"]
    search_fields = ["=id", "=owner__username", "=registration__id"]
    ordering = ["-created_at"]
    editable = ["url", "registration", "on_completed", "on_failed", "on_cancelled"]
    read_only = [
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
        """Refuse filters on secrets and URLs, which may hold one: they would reveal it letter by
        letter."""
        if lookup.partition("__")[0] in ("secret", "old_secret", "url"):
            return False
        return bool(super().lookup_allowed(lookup, value, request))

    def has_change_permission(self, request: HttpRequest, obj: Subscription | None = None) -> bool:
        """Require the permission to read the messages that a webhook sends."""
        may_change = super().has_change_permission(request, obj)
        return may_change and (obj is None or may_read(request, obj.owner_id))

    def get_fields(self, request: HttpRequest, obj: Subscription | None = None) -> list[str]:
        if obj is None:
            return self.editable
        may_change = self.has_change_permission(request, obj)
        return ["url" if may_change else "host", *self.editable[1:], *self.read_only]

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        return ["host", *self.read_only]

    def get_deleted_objects(self, objs: Any, request: HttpRequest) -> Any:
        """Return the number of deliveries instead of their names: there may be a million."""
        webhooks = list(objs)
        deliveries = Delivery.objects.filter(subscription__in=webhooks).count()
        counts = {"webhooks": len(webhooks), "deliveries": deliveries}
        return [str(each) for each in webhooks], counts, set(), []

    def get_form(self, request: HttpRequest, obj: Any = None, **kwargs: Any) -> Any:
        form: Any = super().get_form(request, obj, **kwargs)
        form.owner = obj.owner if obj else request.user
        return form

    def response_add(self, request: HttpRequest, obj: Any, post_url_continue: Any = None) -> Any:
        """Redirect to the webhook's page, which shows the secret."""
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
        new = request.session.get(NEW_SECRET, {})
        if request.method == "GET" and object_id and new.get("id") == unquote(object_id):
            del request.session[NEW_SECRET]
            if subscription := Subscription.objects.filter(pk=new["id"]).first():
                extra["new_secret"] = subscription.secret
        return super().changeform_view(request, object_id, form_url, extra)

    @admin.display(description="receiver", ordering="url")
    def host(self, subscription: Subscription) -> str:
        return subscription.host

    @display(description="state", label={"enabled": "success", "disabled": "danger"})
    def state(self, subscription: Subscription) -> str:
        return "enabled" if subscription.enabled else "disabled"

    @admin.display
    def signing_secret(self, subscription: Subscription) -> str:
        until = subscription.old_secret_until
        old = f", and the previous one until {until:%Y-%m-%d %H:%M} UTC" if until else ""
        return f"whsec_••••{old if subscription.is_rotating else ''}"

    @admin.display(description="deliveries")
    def delivered(self, subscription: Subscription) -> str:
        deliveries = reverse("admin:webhooks_delivery_changelist")
        url = f"{deliveries}?subscription__id__exact={subscription.pk}"
        return format_html('<a href="{}">All deliveries</a>', url)

    def has_rotate_permission(self, request: HttpRequest, object_id: str = "") -> bool:
        row = Subscription.objects.filter(pk=unquote(str(object_id))).first()
        return row is not None and self.has_change_permission(request, row)

    enable = switch_action(
        "enable", "Enable this webhook?", "Pending and new deliveries are sent again."
    )
    disable = switch_action(
        "disable",
        "Disable this webhook?",
        "Nothing is sent until it is enabled again; pending deliveries continue then. Results of the "
        "time in between are not delivered.",
    )

    @action(
        description="Rotate the secret",
        permissions=["rotate"],
        icon="key",
        url_path="rotate",
        dialog=dialog(
            "Rotate the signing secret?",
            "The new secret is shown once. Both secrets sign each delivery for one day.",
            "Rotate",
        ),
    )
    def rotate(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        def rotate(subscription: Subscription) -> bool:
            subscription.rotate()
            _show_once(request, subscription)
            return True

        return self.perform(request, form, object_id, audit.Action.ROTATE, rotate)


def _show_once(request: HttpRequest, subscription: Subscription) -> None:
    """Show the secret on the caller's next visit to the webhook's page."""
    request.session[NEW_SECRET] = {"id": str(subscription.pk)}


@admin.register(Delivery)
class DeliveryAdmin(ReasonMixin, MaskedBodiesMixin, ReadOnlyAdmin):
    empty = EmptyState("Each result sent to a webhook appears here. Add a webhook first.")
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
    list_filter = ["status", PeriodFilter]
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
        is_link = lookup == "subscription__id__exact"
        return is_link or super().lookup_allowed(lookup, value, request)

    def has_delete_permission(self, request: HttpRequest, obj: Delivery | None = None) -> bool:
        """Allow deletion with its webhook or thread, but not from its own pages."""
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
            "Send this delivery again?",
            "It is sent at once with the same ID, so the receiver can recognise it, and with all its "
            "attempts.",
            "Send again",
        ),
    )
    def resend(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        return self.perform(request, form, object_id, audit.Action.RESEND, Delivery.resend)


bulk.register(
    bulk.BulkAction(
        name="webhooks.resend_delivery",
        model=Delivery,
        title="Send again",
        action=audit.Action.RESEND,
        perform=Delivery.resend,
        explanation="Each delivery is sent again with its ID and all its attempts. Deliveries already "
        "due and those of disabled webhooks stay unchanged.",
        order="created_at",
    )
)
