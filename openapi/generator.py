"""The OpenAPI description. drf-spectacular walks the URLs and reads the serializers;
drf-spectacular-jsonapi turns them into resource objects."""

from typing import Any

from django.conf import settings
from django.test import override_settings
from drf_spectacular import drainage
from drf_spectacular.generators import SchemaGenerator
from drf_spectacular.renderers import OpenApiYamlRenderer
from drf_spectacular.settings import patched_settings
from drf_spectacular.validation import validate_schema

from openapi import documents, plain, realm
from openapi.parts import DOCUMENT_RESPONSES, DOCUMENT_SCHEMAS

SETTINGS = {
    "TITLE": "Botrealm",
    "DESCRIPTION": "Send messages to agents over HTTP, in plain JSON or JSON:API, and register bots "
    "for Matrix rooms. docs/reference/http.md has examples.",
    "ENUM_GENERATE_CHOICE_DESCRIPTION": False,
    "POSTPROCESSING_HOOKS": [],
    "VERSION": settings.VERSION,
    "OAS_VERSION": "3.1.0",
    "COMPONENT_SPLIT_REQUEST": True,
    "SCHEMA_PATH_PREFIX": "",
    "TAGS": [
        {"name": "chat", "description": "Plain JSON and event streams."},
        {"name": "resources", "description": "JSON:API resources."},
        {
            "name": "realm",
            "description": "The realm server: sessions, bots, commands and webhooks.",
        },
    ],
    "SECURITY": [{"realmToken": []}, {"session": []}],
    "APPEND_COMPONENTS": {
        "schemas": plain.SCHEMAS | DOCUMENT_SCHEMAS | realm.DOCUMENTS | documents.DOCUMENTS,
        "responses": plain.RESPONSES | DOCUMENT_RESPONSES,
        "securitySchemes": {
            "realmToken": {
                "type": "http",
                "scheme": "bearer",
                "bearerFormat": "JWT",
                "description": "A realm-server JWT from `POST /_server-session`.",
            },
            "session": {
                "type": "apiKey",
                "in": "cookie",
                "name": "sessionid",
                "description": "The session of a signed-in user. Requests other than GET also need the "
                "CSRF token in `X-CSRFToken`.",
            },
        },
    },
}


class OperationSchema(documents.DocumentSchema):
    """Takes plain JSON operations from `plain` and derives JSON:API operations from their views."""

    def get_operation(self, *args: Any) -> Any:
        path, _, _, method, _ = args
        if (method, path) in plain.OPERATIONS:
            return plain.OPERATIONS[method, path]
        return super().get_operation(*args)


class DescriptionGenerator(SchemaGenerator):
    def parse(self, *args: Any, **kwargs: Any) -> Any:
        paths = super().parse(*args, **kwargs)
        unknown = {path for _, path in plain.OPERATIONS} - paths.keys()
        if unknown:
            raise LookupError(
                f"openapi/plain.py describes unknown paths: {', '.join(sorted(unknown))}"
            )
        return paths


def generate() -> str:
    """Return the text of docs/openapi.yaml. Raises `ValueError` if something cannot be described."""
    framework = settings.REST_FRAMEWORK | {
        "DEFAULT_SCHEMA_CLASS": f"{__name__}.{OperationSchema.__qualname__}"
    }
    with override_settings(REST_FRAMEWORK=framework), patched_settings(SETTINGS):
        schema = DescriptionGenerator().get_schema(public=True)
    if drainage.GENERATOR_STATS:
        drainage.GENERATOR_STATS.emit_summary()
        raise ValueError("drf-spectacular reported warnings; see above.")
    validate_schema(schema)
    return OpenApiYamlRenderer().render(schema, renderer_context={}).decode()
