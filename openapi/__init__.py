"""Describes the HTTP API: `python -m openapi` writes docs/openapi.yaml, which is what is served.

Of JSON:API the shapes are read from the serializers; what plain JSON and the streams say stands in
`plain`. None of this is needed at run time.
"""
