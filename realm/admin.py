from django.contrib import admin
from django.contrib.auth.admin import UserAdmin

from realm.models import User


@admin.register(User)
class RealmUserAdmin(UserAdmin):
    list_display = ["username", "matrix_user_id", "is_staff", "date_joined"]
    search_fields = ["=username", "=matrix_user_id", "^email"]
    fieldsets = [
        *(UserAdmin.fieldsets or []),
        ("Matrix", {"fields": ["matrix_user_id"]}),
    ]
