from django.urls import path, re_path, register_converter
from django.urls.converters import StringConverter

from chat import views


class IdConverter(StringConverter):
    """Ids of threads and runs (chat.models.CHOSEN_ID). What cannot be one is not looked up."""

    regex = "[A-Za-z0-9_-]{1,64}"


register_converter(IdConverter, "id")

urlpatterns = [
    path("api", views.ApiRootView.as_view()),
    path("api/chat/messages", views.MessagesView.as_view()),
    path("api/chat/threads", views.ThreadsView.as_view()),
    path("api/chat/threads/<id:thread_id>", views.ThreadView.as_view()),
    path("api/chat/threads/<id:thread_id>/messages", views.ThreadMessagesView.as_view()),
    path("api/chat/threads/<id:thread_id>/events", views.ThreadEventsView.as_view()),
    path("api/chat/runs/<id:run_id>", views.RunView.as_view()),
    path("api/chat/runs/<id:run_id>/events", views.RunEventsView.as_view()),
    path("api/chat/runs/<id:run_id>/cancel", views.RunCancelView.as_view()),
    path("api/chat/runs/<id:run_id>/retry", views.RunRetryView.as_view()),
    path("api/chat/models", views.ModelsView.as_view()),
    re_path(r"^api/", views.UnknownPathView.as_view()),
]
