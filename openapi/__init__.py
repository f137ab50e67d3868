"""The OpenAPI description: `python -m openapi` writes docs/openapi.yaml, which the server serves.

JSON:API schemas derive from the serializers, plain JSON schemas from `chat.representation`; operations
of plain JSON are in `plain`. None of this is needed at run time.
"""
