"""Look for known vulnerabilities in the locked requirements: `make audit`.

pip-audit reports that all is well where it reaches no advisory service, so a service counts only if it
reports a known vulnerability. Exit status: 0 if none was found or no service could be reached
(the output says which), 1 if one was found.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ("base.txt", "local.txt", "dev.txt", "homeserver.txt", "redis.txt", "installer.txt")
SERVICES = ("pypi", "osv")
KNOWN_VULNERABLE = "requests==2.19.0"  # CVE-2018-18074
PINNED = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;]+)", re.M)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        service, reasons = _reachable_service(Path(folder))
        if service is None:
            print(f"NOT AUDITED: no advisory service can be reached. {'; '.join(reasons)}")
            return 0
        report, error = _audit(Path(folder), service, locked())
    found = findings(report, locked())
    if not report:
        found = [f"pip-audit failed: {error.strip()[-500:]}"]
    print(
        "\n".join(found)
        or f"{len(locked())} packages audited by {service}: no known vulnerabilities."
    )
    return 1 if found else 0


def locked() -> dict[str, str]:
    """Return the version of every locked package, by its normalized name."""
    texts = [(ROOT / "requirements" / name).read_text() for name in LOCKS]
    return {_normalized(name): version for name, version in PINNED.findall("\n".join(texts))}


def findings(report: dict[str, Any], required: dict[str, str]) -> list[str]:
    """Return the problems in a report of pip-audit: vulnerabilities, and packages that it skipped."""
    dependencies = report.get("dependencies", [])
    audited = {
        _normalized(each["name"]): each.get("version")
        for each in dependencies
        if "skip_reason" not in each
    }
    vulnerable = [
        f"{each['name']} {each['version']} has {vulnerability['id']}"
        for each in dependencies
        for vulnerability in each.get("vulns", [])
    ]
    missing = [name for name, version in required.items() if audited.get(name) != version]
    return [*vulnerable, *(f"{name} was not audited" for name in missing)]


def _reachable_service(folder: Path) -> tuple[str | None, list[str]]:
    name, version = KNOWN_VULNERABLE.split("==")
    reasons = []
    for service in SERVICES:
        report, error = _audit(folder, service, {name: version})
        if any(each.get("vulns") for each in report.get("dependencies", [])):
            return service, reasons
        reasons.append(f"{service}: {(error.strip().splitlines() or ['no answer'])[-1][:200]}")
    return None, reasons


def _audit(folder: Path, service: str, packages: dict[str, str]) -> tuple[dict[str, Any], str]:
    requirements = folder / "requirements.txt"
    requirements.write_text("".join(f"{name}=={version}\n" for name, version in packages.items()))
    command = [
        *(sys.executable, "-m", "pip_audit", "--format=json", "--progress-spinner=off"),
        *("--no-deps", "--disable-pip", "--timeout", "10", "--cache-dir", str(folder / "cache")),
        *("-s", service, "-r", str(requirements)),
    ]
    process = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    try:
        return json.loads(process.stdout), process.stderr
    except json.JSONDecodeError:
        return {}, process.stderr


def _normalized(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
