"""Clients that other people generate from docs/openapi.yaml, used against the server."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from realm import tokens
from realm.models import User
from tests import nodepackages
from tests.chat.asgi_client import go
from tests.chat.serving import output_of, serving
from tests.realm.homeserver import Homeserver

HERE = Path(__file__).resolve().parent
DESCRIPTION = HERE.parent.parent / "docs/openapi.yaml"
USER = "@client:localhost"
TYPESCRIPT = HERE / "typescript"
COMPILER_OPTIONS = {
    "strict": True,
    "target": "es2022",
    "module": "nodenext",
    "lib": ["es2022", "dom", "dom.iterable"],
    "types": [],
    "skipLibCheck": True,
}


@pytest.fixture
def user(settings: Any, redis: Any) -> Any:
    settings.CHAT_ALLOW_ANONYMOUS = False
    settings.HOOKS_ALLOWED_HOSTS = ["hooks.example.org"]
    with Homeserver() as homeserver:
        settings.MATRIX_URL = homeserver.url
        homeserver.users["an-openid-token"] = USER
        yield User.objects.create_matrix_user(USER)


def run(*command: str | Path, folder: Path) -> str:
    ended = subprocess.run(
        [str(each) for each in command],
        cwd=folder,
        env=nodepackages.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def use(*command: str | Path, folder: Path) -> None:
    async def scene() -> None:
        async with serving() as url:
            arguments = (*map(str, command), url, tokens.issue(USER), USER)
            code, output = await output_of(*arguments, seconds=120, folder=folder)
            assert code == 0, output

    go(scene())


@pytest.mark.django_db(transaction=True)
def test_openapi_python_client(user: User, tmp_path: Path) -> None:
    generator = Path(sys.executable).with_name("openapi-python-client")
    command = [generator, "generate", "--path", DESCRIPTION, "--output-path", "client"]
    output = run(*command, "--meta=none", folder=tmp_path)
    assert "WARNING" not in output
    generated = (tmp_path / "client/api").rglob("[!_]*.py")
    assert {each.stem for each in generated} == {snake(name) for name in operation_ids()}

    shutil.copy(HERE / "generated_client.py", tmp_path)
    use(sys.executable, "generated_client.py", folder=tmp_path)


@pytest.mark.django_db(transaction=True)
def test_typescript_clients(user: User, tmp_path: Path) -> None:
    packages = nodepackages.installed(TYPESCRIPT)
    programs = packages / "node_modules/.bin"
    (tmp_path / "node_modules").symlink_to(packages / "node_modules")
    for each in TYPESCRIPT.glob("*.ts"):
        shutil.copy(each, tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "tsconfig.json").write_text(json.dumps({"compilerOptions": COMPILER_OPTIONS}))
    output = {"target": "api.ts", "client": "fetch"}
    config = {"api": {"input": str(DESCRIPTION), "output": output}}
    (tmp_path / "orval.config.js").write_text(f"export default {json.dumps(config)}")

    run(programs / "openapi-typescript", DESCRIPTION, "-o", "schema.d.ts", folder=tmp_path)
    run(programs / "orval", folder=tmp_path)
    run(programs / "tsc", folder=tmp_path)
    text = (tmp_path / "api.ts").read_text()
    assert {name for name in operation_ids() if f"const {name} = " not in text} == set()
    for script in ("use_fetch.js", "use_orval.js"):
        use(nodepackages.NODE, script, folder=tmp_path)


def operation_ids() -> set[str]:
    paths = yaml.safe_load(DESCRIPTION.read_text())["paths"]
    return {operation["operationId"] for each in paths.values() for operation in each.values()}


def snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)
