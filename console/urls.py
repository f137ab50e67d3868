"""Admin pages without a model."""

from django.contrib import admin
from django.urls import path

from console import login, system

urlpatterns = [
    path("system/", admin.site.admin_view(system.page), name="console_system"),
    path("totp/", admin.site.admin_view(login.totp), name="console_totp"),
]
