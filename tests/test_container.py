"""The container file: what can be tested of it without building it."""

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


def of(instruction: str) -> list[str]:
    """What the file has for an instruction, in order."""
    return [rest for name, rest in LINES if name == instruction]


def test_it_copies_what_the_package_is_built_of() -> None:
    copied = [path for line in of("COPY") for path in line.split()[:-1]]
    assert all((ROOT / path).exists() for path in copied)
    assert {"reward", "pyproject.toml", "README.md", "constraints.txt"} <= set(copied)


def test_the_server_is_an_ordinary_user_and_ends_by_sigterm() -> None:
    """The user who was made is the one who serves; as exec form it is the process that is asked."""
    [user] = of("USER")
    assert f"--uid {user} " in of("RUN")[0]
    assert int(user) > 0
    names = [name for name, _ in LINES]
    assert names.index("USER") < names.index("ENTRYPOINT")


def test_it_serves_as_the_command_line_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    [command] = map(json.loads, of("ENTRYPOINT"))
    assert command[:3] == ["python", "-m", serve.__name__]
    monkeypatch.setattr("sys.argv", ["serve", *command[3:]])
    monkeypatch.setenv("REWARD_API_KEY", "sesame")
    options = serve.parse()
    assert (options.model, f"{options.port}") == (Path("/model"), *of("EXPOSE"))


def test_it_is_healthy_while_the_server_answers() -> None:
    [line] = of("HEALTHCHECK")
    python, *arguments = json.loads(line.partition(" CMD ")[2])
    [port] = of("EXPOSE")
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
