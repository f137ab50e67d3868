"""npm packages for tests, installed once from a lock file and kept in .venv."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

NODE = Path(sys.executable).parent / "node"
KEPT = Path(sys.prefix) / "npm"


def installed(folder: Path) -> Path:
    """Install the packages of `folder`'s package-lock.json; return a folder with `node_modules`.

    Scripts of packages do not run. Raises `subprocess.CalledProcessError` with npm's output.
    """
    lock = folder / "package-lock.json"
    target = KEPT / hashlib.sha256(lock.read_bytes()).hexdigest()[:16]
    done = target / ".installed"
    KEPT.mkdir(exist_ok=True)
    with target.with_suffix(".lock").open("w") as mutex:
        fcntl.flock(mutex, fcntl.LOCK_EX)
        if done.exists():
            return target
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for name in ("package.json", "package-lock.json"):
            shutil.copy(folder / name, target)
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        subprocess.run(
            [NODE.with_name(command[0]), *command[1:]],
            cwd=target,
            env=environment(),
            timeout=600,
            check=True,
        )
        done.touch()
    return target


def environment() -> dict[str, str]:
    """Return the environment of programs that find this Node.js first."""
    return os.environ | {"PATH": f"{NODE.parent}{os.pathsep}{os.environ.get('PATH', '')}"}


if __name__ == "__main__":  # `python -m tests.nodepackages FOLDER ...` installs them beforehand
    for name in sys.argv[1:]:
        installed(Path(name))
