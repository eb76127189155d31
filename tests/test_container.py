"""The Containerfile, as far as it can be tested without building it."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
from aiohttp.test_utils import TestClient, TestServer

from reward.serving import serve
from reward.serving.scorer import Scorer
from tests.support import ROOT

LINES = [
    line.split(maxsplit=1)
    for line in (ROOT / "Containerfile").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]


def arguments_of(instruction: str) -> list[str]:
    """The arguments of every use of an instruction, in order."""
    return [rest for name, rest in LINES if name == instruction]


def test_image_copies_the_package_sources() -> None:
    copied = [path for line in arguments_of("COPY") for path in line.split()[:-1]]
    assert all((ROOT / path).exists() for path in copied)
    assert {"reward", "pyproject.toml", "README.md", "constraints.txt"} <= set(copied)


def test_server_runs_as_ordinary_user_and_receives_sigterm() -> None:
    """The image creates this user, and the exec form lets the signal reach the server."""
    [user] = arguments_of("USER")
    assert f"--uid {user} " in arguments_of("RUN")[0]
    assert int(user) > 0
    names = [name for name, _ in LINES]
    assert names.index("USER") < names.index("ENTRYPOINT")


def test_entrypoint_is_a_valid_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    [command] = map(json.loads, arguments_of("ENTRYPOINT"))
    assert command[:3] == ["python", "-m", serve.__name__]
    monkeypatch.setattr("sys.argv", ["serve", *command[3:]])
    monkeypatch.setenv("REWARD_API_KEY", "sesame")
    options = serve.parse()
    assert (options.model, f"{options.port}") == (Path("/model"), *arguments_of("EXPOSE"))


def test_image_is_healthy_while_the_server_answers() -> None:
    [line] = arguments_of("HEALTHCHECK")
    python, *arguments = json.loads(line.partition(" CMD ")[2])
    [port] = arguments_of("EXPOSE")
    assert python == "python"

    def status(found: int) -> int:
        code = [argument.replace(f":{port}/", f":{found}/") for argument in arguments]
        assert code != arguments
        return subprocess.run([sys.executable, *code], stderr=subprocess.DEVNULL).returncode

    async def work() -> tuple[int, int]:
        application = serve.Service(cast(Scorer, None), "sesame").application()
        async with TestClient(TestServer(application)) as client:
            there = await asyncio.to_thread(status, cast(int, client.port))
        return there, status(cast(int, client.port))

    assert asyncio.run(work()) == (0, 1)
