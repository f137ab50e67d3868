#!/bin/sh
# install.sh FILE...: install locked requirements into .venv.
#
# uv needs a fourth of pip's processor time, but does not read pip's configuration and is not built for every
# platform: with an index or a proxy configured for pip, and wherever uv fails, pip installs instead.
# Neither compiles to bytecode: Python does so for what it imports.
set -eu
cd "$(dirname "$0")/.."
python=.venv/bin/python
for file; do
  shift
  set -- "$@" --requirement "$file"
done

uv_usable() {
  [ -x .venv/bin/uv ] && ! "$python" -m pip config list 2>/dev/null | grep -Eq '\.(index-url|no-index|proxy)='
}

if uv_usable &&
  .venv/bin/uv pip install --python "$python" --quiet --system-certs --require-hashes "$@" 2>/dev/null; then
  exit 0
fi
exec "$python" -m pip install --quiet --disable-pip-version-check --no-compile --require-hashes "$@"
