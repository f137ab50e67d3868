"""The whole description: drf-spectacular walks the addresses and reads the serializers;
drf-spectacular-jsonapi makes resource objects of them."""

from typing import Any

from django.conf import settings
from django.test import override_settings
from drf_spectacular import drainage
from drf_spectacular.generators import SchemaGenerator
from drf_spectacular.renderers import OpenApiYamlRenderer
from drf_spectacular.settings import patched_settings
from drf_spectacular.validation import validate_schema

from openapi import documents, plain
from openapi.parts import DOCUMENT_RESPONSES, DOCUMENT_SCHEMAS

SETTINGS = {
    "TITLE": "Botrealm",
    "DESCRIPTION": "Ask agents over HTTP, in plain JSON or JSON:API, and register bots for Matrix "
    "rooms. docs/reference/http.md tells it with examples.",
    "ENUM_GENERATE_CHOICE_DESCRIPTION": False,
    "POSTPROCESSING_HOOKS": [],
    "VERSION": settings.VERSION,
    "OAS_VERSION": "3.1.0",
    "COMPONENT_SPLIT_REQUEST": True,
    "SCHEMA_PATH_PREFIX": "",
    "TAGS": [
        {"name": "chat", "description": "Plain JSON and streams."},
        {"name": "resources", "description": "The same as JSON:API resources."},
        {"name": "realm", "description": "The realm server: sessions, bots and their commands."},
    ],
    "SECURITY": [{"realmToken": []}, {"session": []}],
    "APPEND_COMPONENTS": {
        "schemas": plain.SCHEMAS | DOCUMENT_SCHEMAS,
        "responses": plain.RESPONSES | DOCUMENT_RESPONSES,
        "securitySchemes": {
            "realmToken": {
                "type": "http",
                "scheme": "bearer",
                "bearerFormat": "JWT",
                "description": "A realm-server JWT, as `POST /_server-session` gives it.",
            },
            "session": {
                "type": "apiKey",
                "in": "cookie",
                "name": "sessionid",
                "description": "Of whoever has signed in to the admin. What is not a GET needs the "
                "CSRF token in `X-CSRFToken` as well.",
            },
        },
    },
}


class Description(documents.Documents):
    """Of plain JSON as it stands in `plain`; of documents, as they are read from their views."""

    def get_operation(self, *args: Any) -> Any:
        path, _, _, method, _ = args
        if (method, path) in plain.OPERATIONS:
            return plain.OPERATIONS[method, path]
        return super().get_operation(*args)


class Generator(SchemaGenerator):
    def parse(self, *args: Any, **kwargs: Any) -> Any:
        paths = super().parse(*args, **kwargs)
        gone = {path for _, path in plain.OPERATIONS} - paths.keys()
        if gone:
            raise LookupError(f"Described, but not served: {', '.join(sorted(gone))}")
        return paths


def described() -> str:
    """docs/openapi.yaml as it should be. Raises where something cannot be described."""
    framework = settings.REST_FRAMEWORK | {
        "DEFAULT_SCHEMA_CLASS": f"{__name__}.{Description.__qualname__}"
    }
    with override_settings(REST_FRAMEWORK=framework), patched_settings(SETTINGS):
        schema = Generator().get_schema(public=True)
    if drainage.GENERATOR_STATS:
        drainage.GENERATOR_STATS.emit_summary()
        raise ValueError("There is more than drf-spectacular understands; see above.")
    validate_schema(schema)
    return OpenApiYamlRenderer().render(schema, renderer_context={}).decode()
