from django.contrib.auth.views import LogoutView
from django.urls import path, re_path, register_converter
from django.urls.converters import StringConverter

from chat import pages, views


class IdConverter(StringConverter):
    """Ids of threads and runs (chat.models.CHOSEN_ID). What cannot be one is not looked up."""

    regex = "[A-Za-z0-9_-]{1,64}"


register_converter(IdConverter, "id")

urlpatterns = [
    path("", pages.HomePage.as_view(), name="chat"),
    path("logout", LogoutView.as_view(next_page="chat"), name="chat_logout"),
    path("threads/<id:thread_id>", pages.ThreadPage.as_view(), name="chat_thread"),
    path("threads/<id:thread_id>/change", pages.ChangeForm.as_view(), name="chat_change"),
    path("threads/<id:thread_id>/delete", pages.DeleteForm.as_view(), name="chat_delete"),
    path("runs/<id:run_id>", pages.TurnPart.as_view(), name="chat_run"),
    path("runs/<id:run_id>/cancel", pages.CancelForm.as_view(), name="chat_cancel"),
    path("runs/<id:run_id>/retry", pages.RetryForm.as_view(), name="chat_retry"),
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
