import json
import os
import sys
from argparse import ArgumentParser
from collections import Counter
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand

from ops import doctor, local

# Set to the folder of the local stack whose settings this process was given.
LOOKS_AT = "DOCTOR_LOOKS_AT"


class Command(BaseCommand):
    help = "Look for what is set up wrong, and say how to mend it. Fails when something is broken."
    # It says itself what is wrong, and must not be kept from it.
    requires_system_checks = []

    def run_from_argv(self, argv: list[str]) -> None:
        """Begin anew with the settings of the local stack, where one runs and none other is named:
        what it has of its own is not broken because this shell knows nothing of it."""
        stack = None if LOOKS_AT in os.environ else local.running()
        if stack and stack.is_meant_by(os.environ):
            environment = os.environ | stack.environment | {LOOKS_AT: str(stack.folder)}
            os.execve(sys.executable, [sys.executable, *sys.argv], environment)  # noqa: S606
        super().run_from_argv(argv)

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="For a machine.")

    def handle(self, *args: Any, **options: Any) -> None:
        findings = doctor.examine()
        levels = Counter(finding.level for finding in findings)
        if options["json"]:
            told = {
                "ok": not levels[doctor.BROKEN],
                "release": settings.RELEASE,
                "stack": os.environ.get(LOOKS_AT),
                "findings": [finding.as_json() for finding in findings],
            }
            self.stdout.write(json.dumps(told, indent=2))
        else:
            self._show(findings, levels)
        if levels[doctor.BROKEN]:
            sys.exit(1)

    def _show(self, findings: list[doctor.Finding], levels: Counter[str]) -> None:
        styles = {
            doctor.OK: self.style.SUCCESS,
            doctor.WARN: self.style.WARNING,
            doctor.BROKEN: self.style.ERROR,
        }
        width = max(len(finding.check) for finding in findings)
        last = ""
        self.stdout.write(f"\n{settings.RELEASE}{self._looks_at()}\n\n")
        for finding in findings:
            name = "" if finding.check == last else finding.check
            last = finding.check
            level = styles[finding.level](f"{finding.level:<6}")
            self.stdout.write(f"  {level}  {name:<{width}}  {finding.said}")
            if finding.mend:
                self.stdout.write(
                    f"          {'':<{width}}  {self.style.NOTICE('→')} {finding.mend}"
                )
        if levels[doctor.BROKEN]:
            summary = self.style.ERROR(f"{levels[doctor.BROKEN]} broken")
        else:
            summary = self.style.SUCCESS("Nothing is broken")
        self.stdout.write(f"\n{summary}, {levels[doctor.WARN]} to look at.\n\n")

    def _looks_at(self) -> str:
        if folder := os.environ.get(LOOKS_AT):
            return f", looking at the local stack of {folder}"
        if stack := local.running():
            return (
                f", looking at what the environment names: not at the local stack of {stack.folder}"
            )
        return ""
