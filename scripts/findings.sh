#!/usr/bin/env bash
# Run the programs in findings/, or those that are named, and sum up; fail if one has failed.
set -uo pipefail
cd "${FINDINGS_DIR:-$(dirname "$0")/../findings}" || exit 1

shopt -s nullglob
files=(*.sh)
if [ $# -gt 0 ]; then files=("${@/%/.sh}"); fi
changed=()
for file in "${files[@]}"; do
  echo "== ${file%.sh}"
  timeout -k 10 600 bash "./$file" </dev/null || changed+=("${file%.sh}")
done
if [ ${#changed[@]} -gt 0 ]; then
  echo "${#changed[@]} of ${#files[@]} findings are not as described: ${changed[*]}"
  exit 1
fi
echo "${#files[@]} findings, all as described"
