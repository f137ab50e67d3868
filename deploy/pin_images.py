"""Pin the images of compose.yaml and the Dockerfile by digest, or update the digests.

Needs Docker: it reads the current digest of each tag from the registry and writes
`name:tag@sha256:...` into both files. Commit the change: a moved tag has no effect then.
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
    """Return the text with each image pinned to the current digest of its tag."""
    return IMAGE.sub(lambda match: f"{match[1]}{match[2]}@{digest(match[2])}", text)


def digest_of(image: str) -> str:
    command = ["docker", "buildx", "imagetools", "inspect", "--format", "{{.Manifest.Digest}}"]
    process = subprocess.run([*command, image], capture_output=True, text=True, check=False)
    digest = process.stdout.strip().strip('"')
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        sys.exit(
            f"No digest for {image}: {process.stderr.strip() or 'unexpected output of docker'}"
        )
    return digest


if __name__ == "__main__":
    main()
