import json
import os
import sys
from argparse import ArgumentParser
from collections import Counter
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand

from lib.terminal import printable
from ops import doctor, local


class Command(BaseCommand):
    help = "Check the setup and show how to fix it. Fails if something is broken."
    # It reports these itself, and must not be stopped by them.
    requires_system_checks = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="Print JSON.")

    def handle(self, *args: Any, **options: Any) -> None:
        findings = doctor.examine()
        levels = Counter(finding.level for finding in findings)
        if options["json"]:
            report = {
                "ok": not levels[doctor.BROKEN],
                "release": settings.RELEASE,
                "stack": os.environ.get(local.FOUND),
                "findings": [finding.as_json() for finding in findings],
            }
            self.stdout.write(json.dumps(report, indent=2))
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
            self.stdout.write(f"  {level}  {name:<{width}}  {printable(finding.message)}")
            if finding.fix:
                self.stdout.write(
                    f"          {'':<{width}}  {self.style.NOTICE('→')} {printable(finding.fix)}"
                )
        if levels[doctor.BROKEN]:
            summary = self.style.ERROR(f"{levels[doctor.BROKEN]} broken")
        else:
            summary = self.style.SUCCESS("Nothing is broken")
        self.stdout.write(f"\n{summary}, {levels[doctor.WARN]} warnings.\n\n")

    def _looks_at(self) -> str:
        if folder := os.environ.get(local.FOUND):
            return f", checking the local stack in {folder}"
        if stack := local.running():
            return (
                f", checking the system of the environment, not the local stack in {stack.folder}"
            )
        return ""
