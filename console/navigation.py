"""The admin's name, colours and sidebar. Strings only: the settings import it before the apps load."""

from typing import Any

from django.templatetags.static import static
from django.urls import reverse_lazy


def _page(title: str, icon: str, name: str) -> dict[str, Any]:
    return {"title": title, "icon": icon, "link": reverse_lazy(f"admin:{name}")}


def _models(*pages: tuple[str, str, str]) -> list[dict[str, Any]]:
    return [
        {
            **_page(title, icon, f"{model.replace('.', '_')}_changelist"),
            "permission": _may_view(model),
        }
        for title, icon, model in pages
    ]


def _may_view(model: str) -> Any:
    app, _, name = model.partition(".")
    return _may(f"{app}.view_{name}")


def _may(permission: str) -> Any:
    return lambda request: request.user.has_perm(permission)


UNFOLD: dict[str, Any] = {
    "SITE_TITLE": "Botrealm",
    "SITE_HEADER": "Botrealm",
    "SITE_SUBHEADER": "Bots, rooms, runs",
    "SITE_SYMBOL": "smart_toy",
    "SITE_URL": reverse_lazy("chat"),
    "STYLES": [lambda request: static("console/lists.css")],
    "SCRIPTS": [lambda request: static("console/landmarks.js")],
    "SHOW_HISTORY": True,
    "SHOW_VIEW_ON_SITE": False,
    "SHOW_BACK_BUTTON": True,
    "LOGIN": {"form": "console.login.LoginForm"},
    "ACCOUNT": {
        "navigation": [
            {"title": "Change password", "link": reverse_lazy("admin:password_change")},
            {"title": "Second factor", "link": reverse_lazy("console_totp")},
        ]
    },
    "DASHBOARD_CALLBACK": "console.home.dashboard",
    "COLORS": {
        "primary": {
            "50": "oklch(97.1% .014 237)",
            "100": "oklch(94.1% .028 237)",
            "200": "oklch(89.1% .057 235)",
            "300": "oklch(82.1% .1 233)",
            "400": "oklch(74.1% .14 236)",
            "500": "oklch(66.1% .16 240)",
            "600": "oklch(55.1% .16 245)",
            "700": "oklch(48.1% .14 246)",
            "800": "oklch(41.1% .12 246)",
            "900": "oklch(36.1% .1 247)",
            "950": "oklch(26.1% .07 248)",
        },
    },
    "COMMAND": {"search_callback": "console.search.command"},
    "SIDEBAR": {
        "show_search": True,
        "command_search": True,
        "show_all_applications": False,
        "navigation": [
            {
                "title": "",
                "items": [_page("Home", "monitoring", "index")],
            },
            {
                "title": "Work",
                "separator": True,
                "items": [
                    *_models(
                        ("Runs", "play_circle", "agents.run"),
                        ("Threads", "forum", "chat.thread"),
                        ("Messages", "chat", "chat.message"),
                        ("Events", "bolt", "agents.event"),
                        ("Summaries", "summarize", "agents.summary"),
                        ("Bulk jobs", "checklist", "console.bulkjob"),
                    ),
                    {
                        **_page("Outbox", "outgoing_mail", "outbox"),
                        "permission": _may_view("agents.event"),
                    },
                    {
                        **_page("Dead letters", "unsubscribe", "dead_letters"),
                        "permission": _may_view("agents.event"),
                    },
                ],
            },
            {
                "title": "Money",
                "separator": True,
                "items": _models(
                    ("Usage", "bar_chart", "agents.usage"),
                    ("Prices", "sell", "agents.price"),
                    ("Limits", "speed", "agents.limit"),
                ),
            },
            {
                "title": "Bots",
                "separator": True,
                "items": _models(
                    ("Registrations", "badge", "realm.botregistration"),
                    ("Commands", "terminal", "realm.botcommand"),
                ),
            },
            {
                "title": "Webhooks",
                "separator": True,
                "items": _models(
                    ("Webhooks", "webhook", "webhooks.subscription"),
                    ("Deliveries", "outbox", "webhooks.delivery"),
                ),
            },
            {
                "title": "Matrix",
                "separator": True,
                "items": _models(
                    ("Bot", "smart_toy", "botrunner.session"),
                    ("Rooms", "meeting_room", "botrunner.room"),
                    ("Room events", "notifications", "botrunner.roomevent"),
                    ("Replies", "reply", "botrunner.reply"),
                ),
            },
            {
                "title": "People",
                "separator": True,
                "items": _models(
                    ("Users", "person", "realm.user"),
                    ("Groups", "group", "auth.group"),
                    ("Audit", "policy", "console.auditentry"),
                ),
            },
            {
                "title": "",
                "separator": True,
                "items": [
                    {
                        "title": "System",
                        "icon": "dns",
                        "link": reverse_lazy("console_system"),
                        "permission": _may("console.see_system"),
                    }
                ],
            },
        ],
    },
}
