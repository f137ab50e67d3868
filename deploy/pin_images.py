"""Pin the images of compose.yaml and the Dockerfile by digest, or pin them anew.

Run it where Docker is: it asks the registry of each image for the digest that its tag has now, and
writes `name:tag@sha256:...` into both files. Commit the change: a tag that moves has no effect then.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("compose.yaml", "Dockerfile")
# `image: name:tag` of compose, `FROM name:tag` of a Dockerfile; an image without a tag is built here.
IMAGE = re.compile(r"^( *image: |FROM )([^\s:@]+:[^\s:@]+)(?:@sha256:[0-9a-f]{64})?", re.M)


def main() -> None:
    for name in FILES:
        path = ROOT / name
        path.write_text(pinned(path.read_text(), digest_of))


def pinned(text: str, digest: Callable[[str], str]) -> str:
    """Return a file's text with each image pinned to the digest that its tag has now."""
    return IMAGE.sub(lambda found: f"{found[1]}{found[2]}@{digest(found[2])}", text)


def digest_of(image: str) -> str:
    command = ["docker", "buildx", "imagetools", "inspect", "--format", "{{.Manifest.Digest}}"]
    found = subprocess.run([*command, image], capture_output=True, text=True, check=False)
    digest = found.stdout.strip().strip('"')
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        sys.exit(f"No digest for {image}: {found.stderr.strip() or 'unexpected output of docker'}")
    return digest


if __name__ == "__main__":
    main()
