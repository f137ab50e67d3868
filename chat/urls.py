from collections.abc import Iterator

from django.contrib.auth.views import LogoutView
from django.urls import URLPattern, path, re_path, register_converter
from django.urls.converters import StringConverter
from rest_framework_json_api.utils import format_field_name

from chat import pages
from chat.api import views
from chat.jsonapi import views as resources
from chat.jsonapi.serializers import (
    MessageSerializer,
    OfThread,
    Relationship,
    ResourceSerializer,
    RunSerializer,
    ThreadSerializer,
)
from lib.jsonapi.views import UnknownPathView


class IdConverter(StringConverter):
    """Ids of threads and runs (chat.models.CHOSEN_ID). Others are not looked up."""

    regex = "[A-Za-z0-9_-]{1,64}"


register_converter(IdConverter, "id")


def resource_paths(
    serializer: type[ResourceSerializer], converter: str, collection: type[resources.CollectionView]
) -> Iterator[URLPattern]:
    """Yield the paths of the list, of one resource, and of its relationships."""
    base = f"api/{serializer.Meta.resource_name}"
    one = f"{base}/<{converter}:id>"
    yield path(base, collection.as_view(serializer_class=serializer))
    yield path(one, resources.ResourceView.as_view(serializer_class=serializer))
    for name, field in serializer().fields.items():
        if isinstance(field, Relationship):
            to_many = isinstance(field, OfThread)
            related = resources.OfThreadView if to_many else resources.RelatedView
            options = {"serializer_class": field.target, "parent": serializer, "relation": name}
            member = format_field_name(name)
            yield path(f"{one}/{member}", related.as_view(**options))
            yield path(f"{one}/relationships/{member}", resources.LinkageView.as_view(**options))


urlpatterns = [
    path("", pages.HomePage.as_view(), name="chat"),
    path("logout", LogoutView.as_view(next_page="chat"), name="chat_logout"),
    path("threads/<id:thread_id>", pages.ThreadPage.as_view(), name="chat_thread"),
    path("threads/<id:thread_id>/change", pages.ChangeForm.as_view(), name="chat_change"),
    path("threads/<id:thread_id>/delete", pages.DeleteForm.as_view(), name="chat_delete"),
    path("runs/<id:run_id>", pages.TurnFragment.as_view(), name="chat_run"),
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
    *resource_paths(ThreadSerializer, "id", resources.CollectionView),
    *resource_paths(MessageSerializer, "uuid", resources.MessagesView),
    *resource_paths(RunSerializer, "id", resources.CollectionView),
    re_path(r"^api/(threads|messages|runs)(/|$)", UnknownPathView.as_view()),
    re_path(r"^api/", views.UnknownPathView.as_view()),
]
