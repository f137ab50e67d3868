"""What runs where is named by lists and scripts; what they name is there."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import OWN_SQL, SHARED_STACK

ROOT = Path(__file__).resolve().parents[2]
FINDINGS = sorted((ROOT / "findings").glob("*.sh"))


@pytest.mark.parametrize("name", [*SHARED_STACK, *(f"tests/{each}" for each in OWN_SQL)])
def test_what_a_list_names_is_there(name: str) -> None:
    assert (ROOT / name).exists()


@pytest.mark.parametrize("name", SHARED_STACK)
def test_a_file_on_the_shared_stack_starts_none_of_its_own(name: str) -> None:
    assert "with Stack(" not in (ROOT / name).read_text()


@pytest.mark.parametrize("path", FINDINGS, ids=lambda path: path.stem)
def test_a_finding_names_its_package_and_what_is_done_about_it(path: Path) -> None:
    lines = path.read_text().splitlines()

    assert lines[0] == "#!/usr/bin/env bash"
    comment = " ".join(line for line in lines[1:12] if line.startswith("#"))
    assert "# Behaviour: " in comment
    assert "# Here: " in comment
    assert "==" in path.read_text(), "the package is pinned"
    assert "mktemp -d" in path.read_text()
    subprocess.run(["bash", "-n", path], check=True, timeout=60)


def findings(folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "scripts/findings.sh", *names],
        env=os.environ | {"FINDINGS_DIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_finding_that_is_not_as_described_any_more_is_named(tmp_path: Path) -> None:
    (tmp_path / "stays.sh").write_text("echo seen 1\n")
    (tmp_path / "changed.sh").write_text("echo seen 2; exit 1\n")

    done = findings(tmp_path)

    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "== changed",
        "seen 2",
        "== stays",
        "seen 1",
        "1 of 2 findings are not as described: changed",
    ]
    assert findings(tmp_path, "stays").returncode == 0


def test_no_findings_are_no_failure(tmp_path: Path) -> None:
    done = findings(tmp_path)

    assert (done.returncode, done.stdout) == (0, "0 findings, all as described\n")


def test_a_part_of_the_night_that_is_not_there_is_refused_with_the_right_ones() -> None:
    done = subprocess.run(
        [ROOT / ".ci/nightly", "tea"], capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 2
    assert "Unknown part tea. The parts: browsers matrix-js findings" in done.stderr
