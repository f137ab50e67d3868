"""Write docs/openapi.yaml."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import django

FILE = Path(__file__).resolve().parent.parent / "docs/openapi.yaml"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m openapi", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare without writing")
    check = parser.parse_args(arguments).check
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
    django.setup()

    from openapi.generator import generate

    text = generate()
    if not check:
        FILE.write_text(text)
    elif not FILE.exists() or FILE.read_text() != text:
        sys.stderr.write("docs/openapi.yaml is out of date. Run: make schema\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
