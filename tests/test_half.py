"""Half precision on a CPU: stages, a resumed run, scoring and serving."""

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet
import pytest
import torch
from aiohttp.test_utils import TestClient, TestServer

from reward.exporting import clients, gate
from reward.exporting.clients import FOUND, Request
from reward.outputs import digests, read_json
from reward.serving import score, serve
from reward.serving.scorer import EXPORT, Scorer
from stages import evaluate, export, train
from tests.support import set_params, train_killed_once

PAIRS = Path("data/raw/pairs.json")
# The largest difference between rewards in half precision and in fp32, relative to the rewards'
# standard deviation. Two layers leave about 6 of the 8 bits of bf16, and 9 of the 11 of fp16.
BOUND = {"bfloat16": 0.1, "float16": 0.02}


def run_clients_unsilenced(request: Request, elsewhere: Path) -> Any:
    """Run export's clients in this process, without silencing warnings."""
    pyarrow.parquet.write_table(clients.find(request), elsewhere / FOUND)
    return type("Done", (), {"returncode": 0})


@pytest.fixture(scope="module")
def half(complete: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder in which train and evaluate (and, in bf16, export) have run; each is made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = folder = tmp_path_factory.mktemp("half") / "project"
            shutil.copytree(complete, folder)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                patch.delenv("DVC_ROOT", raising=False)
                patch.setattr(gate, "run_clients", run_clients_unsilenced)
                set_params("quantization", compute_dtype=name)
                for stage in (train, evaluate, *([export] if name == "bfloat16" else [])):
                    stage.main()
        return made[name]

    return make


def rewards_of(folder: Path) -> torch.Tensor:
    table = pyarrow.parquet.read_table(folder / evaluate.REPORTS / "rewards.parquet")
    columns = [table[f"reward_{side}"].to_pylist() for side in ("chosen", "rejected")]
    return torch.tensor(columns, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore")  # warnings of client libraries
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_rewards_match_fp32_up_to_rounding(
    half: Callable[[str], Path], complete: Path, name: str
) -> None:
    folder = half(name)
    found, exact = rewards_of(folder), rewards_of(complete)
    difference = (found - exact).abs().max() / exact.std()
    assert 0 < difference <= BOUND[name]


@pytest.mark.filterwarnings("ignore")  # warnings of client libraries
def test_every_client_loads_the_export_in_its_precision(half: Callable[[str], Path]) -> None:
    folder = half("bfloat16")
    assert read_json(folder / export.EXPORT / "reward.json")["dtype"] == "bfloat16"
    by_client = read_json(folder / export.REPORTS / "figures.json")["clients"]
    assert by_client.keys() == {client.name for client in clients.select("light", merged=True)}
    assert by_client["packs"]["packs"]["difference_max"] == 0


def test_file_and_request_get_the_evaluated_rewards(
    half: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Up to rounding, because the texts are packed differently, which changes the order of sums."""
    folder = half("bfloat16")
    monkeypatch.chdir(tmp_path)
    expected = {tuple(pair.tolist()) for pair in rewards_of(folder).T}
    scorer = Scorer(folder / EXPORT)
    monkeypatch.setattr(score, "Scorer", lambda _: scorer)
    given = (folder / PAIRS, "--model", folder / EXPORT, "--output", "rewards.jsonl")
    monkeypatch.setattr("sys.argv", ["score", *map(str, given)])
    score.main()
    lines = Path("rewards.jsonl").read_text(encoding="utf-8").splitlines()
    from_file = [tuple(json.loads(line)["rewards"]) for line in lines]

    async def asked() -> list[float]:
        pairs = read_json(folder / PAIRS)
        content = {
            "prompts": [pair["prompt"] for pair in pairs for _ in range(2)],
            "answers": [pair[side] for pair in pairs for side in ("chosen", "rejected")],
        }
        async with TestClient(TestServer(serve.Service(scorer).application())) as client:
            response = await client.post("/get_reward", json=content)
            return cast(list[float], (await response.json())["rewards"])

    answered = asyncio.run(asked())
    from_server = list(zip(answered[::2], answered[1::2], strict=True))
    bound = BOUND["bfloat16"] * rewards_of(folder).std().item()
    for found in (from_file, from_server):
        for pair in expected:
            assert any(pair == pytest.approx(row, abs=bound) for row in found)


def test_killed_run_in_half_precision_ends_with_the_same_bytes(
    half: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = half("bfloat16")
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    assert train_killed_once(monkeypatch) == [0, 1, 1]
    assert digests(train.ADAPTER) == digests(whole / train.ADAPTER)
