"""A user's webhooks: `/_webhook-subscription...` in JSON:API."""

from rest_framework.request import Request
from rest_framework.response import Response

from realm.views import RealmServerView
from webhooks.models import Subscription
from webhooks.serializers import NewSubscriptionSerializer, SubscriptionSerializer


class SubscriptionView(RealmServerView):
    serializer_class = NewSubscriptionSerializer

    def post(self, request: Request) -> Response:
        response = self.create(request, owner=self.caller)
        response["Cache-Control"] = "no-store"
        return response

    def delete(self, request: Request, id: str | None = None) -> Response:
        return self.destroy(request, id, Subscription)


class SubscriptionsView(RealmServerView):
    serializer_class = SubscriptionSerializer

    def get(self, request: Request) -> Response:
        rows = Subscription.objects.of(self.caller)
        return Response(self.get_serializer(rows, many=True).data)
