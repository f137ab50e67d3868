from django.urls import path, re_path

from chat import views

urlpatterns = [
    path("api", views.ApiRootView.as_view()),
    path("api/chat/messages", views.MessagesView.as_view()),
    path("api/chat/threads/<str:thread_id>/messages", views.ThreadMessagesView.as_view()),
    path("api/chat/runs/<str:run_id>", views.RunView.as_view()),
    path("api/chat/models", views.ModelsView.as_view()),
    re_path(r"^api/", views.UnknownPathView.as_view()),
]
