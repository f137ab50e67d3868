#!/usr/bin/env bash
# pytest-xdist 3.8.0 with pytest 9.2.0 (PyPI)
# Behaviour: `--dist loadgroup` spreads the tests of one xdist_group over several processes, without a
# warning. The documentation promises that they run in the same one. (xdist appends "@group" to the private
# attribute `_nodeid` of an item, which this pytest no longer has.)
# Here: tests/conftest.py groups files by a scheduler of its own (SharedStacks).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check pytest==9.2.0 pytest-xdist==3.8.0
cat >test_group.py <<'TEST'
import os, time
import pytest

@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("number", range(8))
def test_it(number):
    with open("processes", "a") as file:
        file.write(os.environ["PYTEST_XDIST_WORKER"] + "\n")
    time.sleep(0.2)
TEST
venv/bin/python -m pytest -q -n 2 --dist loadgroup
seen=$(sort -u processes | wc -l)
echo "The 8 tests of one group ran in $seen processes."
[ "$seen" -gt 1 ]
