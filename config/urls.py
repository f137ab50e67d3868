from django.contrib import admin
from django.urls import include, path

from chat import pages
from config import description
from console.login import ChatLoginForm

admin.autodiscover()

urlpatterns = [
    path("login", pages.LoginPage.as_view(authentication_form=ChatLoginForm), name="chat_login"),
    path("api/schema", description.schema, name="api_schema"),
    path("api/docs", description.page),
    path("", include("chat.urls")),
    # Before the realm server's, which answers all paths that start with `_`.
    path("", include("webhooks.urls")),
    path("", include("realm.urls")),
    path("admin/", include("console.urls")),
    path("admin/", admin.site.urls),
]
