#!/usr/bin/env bash
# openapi-python-client 0.29.1 (PyPI)
# Behaviour: for an operation without parameters whose body may have one of two media types, the generated
# module uses the name `Unset` and does not import it: importing the module raises NameError. The generator
# warns of nothing. With one media type, or with an optional parameter beside it, the module is fine.
# Its README promises support for OpenAPI 3.1 and for several request bodies of one operation.
# Here: openapi/realm.py describes one media type of POST /_server-session (two are accepted).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check openapi-python-client==0.29.1
cat >"$folder/api.yaml" <<'YAML'
openapi: 3.1.0
info: {title: Example, version: "1"}
paths:
  /sessions:
    post:
      operationId: openSession
      requestBody:
        required: true
        content:
          application/json: {schema: {$ref: "#/components/schemas/Login"}}
          application/vnd.example+json: {schema: {$ref: "#/components/schemas/Document"}}
      responses: {"204": {description: Opened.}}
components:
  schemas:
    Login: {type: object, properties: {name: {type: string}}}
    Document: {type: object, properties: {data: {type: string}}}
YAML
cd "$folder"
venv/bin/openapi-python-client generate --path api.yaml --output-path client --meta none >log 2>&1 || { cat log; exit 1; }
warnings=$(grep -c '^WARNING' log || true)
seen=$(venv/bin/python -c 'import client.api.default.open_session' 2>&1 | tail -n 1 || true)
echo "Warnings of the generator: $warnings"
echo "Importing the generated module: $seen"
[ "$warnings" = 0 ]
[[ $seen == "NameError: name 'Unset' is not defined"* ]]
