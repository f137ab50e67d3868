from django.urls import path, re_path

from lib.jsonapi.views import UnknownPathView
from realm import views

urlpatterns = [
    path("_server-session", views.ServerSessionView.as_view()),
    path("_bot-registrations", views.BotRegistrationsView.as_view()),
    path("_bot-registration", views.BotRegistrationView.as_view()),
    path(
        "_bot-registration/<str:id>",
        views.BotRegistrationView.as_view(http_method_names=["delete"]),
    ),
    path("_bot-commands", views.BotCommandsView.as_view()),
    path("_bot-commands/<str:id>", views.BotCommandsView.as_view(http_method_names=["delete"])),
    re_path(r"^_", UnknownPathView.as_view()),
]
