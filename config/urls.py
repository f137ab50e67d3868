from django.contrib import admin
from django.urls import include, path
from django.views.generic import RedirectView

from config import description

admin.autodiscover()

urlpatterns = [
    path("", RedirectView.as_view(pattern_name="admin:index")),
    path("api/schema", description.schema),
    path("api/docs", description.page),
    path("", include("chat.urls")),
    # Before the realm server's, which answers for all that begins with `_`.
    path("", include("hooks.urls")),
    path("", include("realm.urls")),
    path("admin/", include("console.urls")),
    path("admin/", admin.site.urls),
]
