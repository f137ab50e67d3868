from django.contrib import admin
from django.urls import include, path
from django.views.generic import RedirectView

admin.autodiscover()

urlpatterns = [
    path("", RedirectView.as_view(pattern_name="admin:index")),
    path("", include("chat.urls")),
    # Before the realm server's, which answers for all that begins with `_`.
    path("", include("hooks.urls")),
    path("", include("realm.urls")),
    path("admin/", include("console.urls")),
    path("admin/", admin.site.urls),
]
