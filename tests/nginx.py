"""A real nginx in front of a web server, which serves it below a path; see docs/how-to/deploy.md."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT
from tests.ports import free_port

GUIDE = ROOT / "docs/how-to/deploy.md"


@contextmanager
def nginx(to: int) -> Iterator[int]:
    """Run nginx with the locations of the guide in front of a port; yield its own port. Skips the test
    where it is not installed."""
    program = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    if program is None:
        pytest.skip("nginx is not installed")
    [locations] = re.findall(r"```nginx\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    with tempfile.TemporaryDirectory(prefix="nginx-") as name:
        folder, port = Path(name), free_port()
        (folder / "nginx.conf").write_text(
            f"daemon off; pid {folder}/pid; error_log stderr; events {{}}\n"
            f"http {{ access_log off; client_body_temp_path {folder}/body;"
            f" proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;"
            f" uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;\n"
            f"server {{ listen 127.0.0.1:{port};\n"
            f"{locations.replace('127.0.0.1:3000', f'127.0.0.1:{to}')}\n}} }}\n"
        )
        process = subprocess.Popen(
            [program, "-c", folder / "nginx.conf", "-p", folder, "-e", folder / "errors"]
        )
        try:
            _wait(port)
            yield port
        finally:
            process.terminate()
            process.wait(20)


def _wait(port: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError("nginx does not listen")
