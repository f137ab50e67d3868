from django.urls import path

from webhooks import views

urlpatterns = [
    path("_webhook-subscriptions", views.SubscriptionsView.as_view()),
    path("_webhook-subscription", views.SubscriptionView.as_view()),
    path(
        "_webhook-subscription/<str:id>",
        views.SubscriptionView.as_view(http_method_names=["delete"]),
    ),
]
