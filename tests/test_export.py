"""The export: complete, checked after reloading, and usable as its card says."""

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

from stages import evaluate, export, pairs, params, preprocess, train
from stages.model import Quantization, seal
from stages.outputs import digests, read_json, write_json
from stages.process import Fault

from .conftest import ROOT, write_pairs

Change = dict[str, dict[str, Any]]
DEFAULT: Change = {
    "preprocess": {"template": "zh", "append_eos": False, "test_fraction": 0.2},
    "quantization": {"bits": 4},
    "train": {"max_steps": 2, "learning_rate": 1e-2},
    "export": {"tolerance": 1e-4},
}
CHAT: Change = {
    "preprocess": {"template": "chat", "append_eos": True, "test_fraction": 0.2},
    "quantization": {"bits": "none"},
    "train": {"max_steps": 1},
}


@pytest.fixture(scope="module")
def evaluated(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Change], Path]:
    """A folder in which everything before export was run, made once for each set of parameters."""
    made: dict[str, Path] = {}

    def make(change: Change) -> Path:
        key = json.dumps(change)
        if key not in made:
            made[key] = folder = tmp_path_factory.mktemp("evaluated")
            yaml = YAML()
            content = yaml.load(ROOT / "params.yaml")
            for group, values in change.items():
                content[group].update(values)
            yaml.dump(content, folder / "params.yaml")
            shutil.copytree(tiny_base, folder / "models" / "base")
            write_pairs(folder / "data" / "raw" / "pairs.json", 20)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                patch.delenv("DVC_ROOT", raising=False)
                for stage in (preprocess, train, evaluate):
                    stage.main()
        return made[key]

    return make


@pytest.fixture
def here(
    evaluated: Callable[[Change], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Change], None]:
    """Go to a copy of such a folder."""

    def go(change: Change) -> None:
        shutil.copytree(evaluated(change), tmp_path, dirs_exist_ok=True)
        monkeypatch.chdir(tmp_path)

    return go


@pytest.fixture
def ready(here: Callable[[Change], None]) -> None:
    here(DEFAULT)


def left_over() -> list[str]:
    """What of the export there is, finished or not."""
    return sorted(path.name for path in Path("models").glob("export*"))


def assemble_here() -> str:
    """The card as the stage would write it, without the check of the rewards."""
    export.EXPORT.mkdir()
    export.assemble(export.EXPORT, params.load("quantization", Quantization))
    return (export.EXPORT / "README.md").read_text(encoding="utf-8")


# --- what is written -------------------------------------------------------------------------


@pytest.mark.usefixtures("ready")
def test_export_holds_all_that_is_needed_and_nothing_else(
    capfd: pytest.CaptureFixture[str],
) -> None:
    export.main()
    first = digests(export.EXPORT)
    assert set(first) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "digests.json",
        "quantization.json",
        "template.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert left_over() == ["export"]
    assert read_json(export.METRICS) == {
        "pairs": 4,
        "difference_max": 0.0,
        "difference_mean": 0.0,
        "flips": 0,
    }
    assert capfd.readouterr().err == ""
    export.main()
    assert digests(export.EXPORT) == first


@pytest.mark.usefixtures("ready")
def test_hub_base_is_named_with_its_commit() -> None:
    base = read_json(export.BASE / "base.json")
    base |= {"name": "Qwen/Qwen2-0.5B", "kind": "hub", "revision": "c0ffee" * 6}
    write_json(export.BASE / "base.json", base)
    export.main()
    config = read_json(export.EXPORT / "adapter_config.json")
    card = (export.EXPORT / "README.md").read_text(encoding="utf-8")
    assert config["base_model_name_or_path"] == "Qwen/Qwen2-0.5B"
    assert config["revision"] == "c0ffee" * 6
    assert YAML().load(card.split("---")[1])["base_model"] == "Qwen/Qwen2-0.5B"
    assert f'base, revision="{"c0ffee" * 6}", num_labels=1' in card


@pytest.mark.usefixtures("ready")
def test_nothing_in_the_export_is_of_this_machine() -> None:
    base = read_json(export.BASE / "base.json")
    write_json(
        export.BASE / "base.json", base | {"name": f"{Path.cwd()}/my-model", "kind": "local"}
    )
    export.main()
    for path in export.EXPORT.iterdir():
        assert str(Path.cwd()).encode() not in path.read_bytes()
    assert "# Reward model over my-model" in (export.EXPORT / "README.md").read_text("utf-8")


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize("part", ["score", "lora_B"])
def test_an_adapter_of_other_rewards_is_not_exported(part: str) -> None:
    path = export.ADAPTER / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if part in name:
            tensors[name] = tensors[name] * 1.1 + 0.01
    save_file(tensors, path)
    seal(export.ADAPTER, export.BASE)
    with pytest.raises(Fault, match=r"differ from reports/evaluate/rewards\.parquet by up to"):
        export.main()
    assert left_over() == []
    assert not export.METRICS.exists()


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize(("shift", "passes"), [(5e-5, True), (2e-4, False), (float("nan"), False)])
def test_rewards_may_differ_within_the_tolerance(shift: float, passes: bool) -> None:
    table = pyarrow.parquet.read_table(export.REWARDS).to_pylist()
    table[2]["reward_rejected"] += shift
    pyarrow.parquet.write_table(pa.Table.from_pylist(table), export.REWARDS)
    if passes:
        export.main()
        assert read_json(export.METRICS)["difference_max"] == pytest.approx(shift, rel=1e-2)
    else:
        with pytest.raises(Fault, match=r"at most 0\.0001 is allowed \(export\.tolerance\)"):
            export.main()
    assert left_over() == (["export"] if passes else [])


@pytest.mark.usefixtures("ready")
def test_a_pair_whose_order_changes_is_counted() -> None:
    table = pyarrow.parquet.read_table(export.REWARDS).to_pylist()
    pair = table[1]
    pair["reward_chosen"], pair["reward_rejected"] = pair["reward_rejected"], pair["reward_chosen"]
    pyarrow.parquet.write_table(pa.Table.from_pylist(table), export.REWARDS)
    content = YAML().load(Path("params.yaml"))
    content["export"]["tolerance"] = 100.0
    YAML().dump(content, Path("params.yaml"))
    export.main()
    assert read_json(export.METRICS)["flips"] == 1


@pytest.mark.usefixtures("ready")
def test_rewards_of_other_pairs_are_refused() -> None:
    table = pyarrow.parquet.read_table(export.REWARDS)
    pyarrow.parquet.write_table(table.slice(1), export.REWARDS)
    with pytest.raises(Fault, match="holds other pairs than data/tokenized/test"):
        export.main()
    assert left_over() == []


# --- the card --------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [DEFAULT, CHAT], ids=["text", "chat"])
def test_code_of_the_card_gives_the_evaluated_rewards(
    here: Callable[[Change], None], change: Change
) -> None:
    here(change)
    export.main()
    card = (export.EXPORT / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        exec(compile(code, "card", "exec"), names)
    rewards = {row["id"]: row for row in pyarrow.parquet.read_table(export.REWARDS).to_pylist()}
    compared = 0
    for record in json.loads(Path("data/raw/pairs.json").read_text(encoding="utf-8")):
        row = rewards.get(pairs.check(record).id)
        if row:
            compared += 1
            for side in ("chosen", "rejected"):
                found = names["reward"](record["prompt"], record[side])
                assert found == pytest.approx(row[f"reward_{side}"], abs=1e-5)
    assert compared == len(rewards) == 4


@pytest.mark.usefixtures("ready")
def test_card_shows_what_it_quotes_as_it_is() -> None:
    figures = {"accuracy": 0.5, "low": 0.25, "high": 0.75, "pairs": 2}
    metrics = read_json(export.EVALUATED)
    metrics["by"] = {"so|urce": {"a | b\n# c": figures, "<script>": figures, "[x](y)": figures}}
    write_json(export.EVALUATED, metrics)
    base = read_json(export.BASE / "base.json")
    write_json(export.BASE / "base.json", base | {"name": "*tiny* <b> `x`\n# Another heading"})
    template = read_json(export.ADAPTER / "template.json")
    text = "```\nQ: {prompt}\n`A`: {answer}"
    write_json(export.ADAPTER / "template.json", template | {"template": text})
    seal(export.ADAPTER, export.BASE)
    card = assemble_here()
    slices = [line for line in card.splitlines() if "0.2500 to 0.7500" in line]
    assert [re.split(r"(?<!\\)\|", line)[1].strip() for line in slices] == [
        r"so\|urce: \<script\>",
        r"so\|urce: \[x\]\(y\)",
        r"so\|urce: a \| b \# c",
    ]
    assert all(len(re.split(r"(?<!\\)\|", line)) == 6 for line in slices)
    assert r"# Reward model over \*tiny\* \<b\> \`x\` \# Another heading" in card.splitlines()
    assert r'as text: ```` "```\nQ: {prompt}\n`A`: {answer}" ````, at most' in card
    assert [line for line in card.splitlines() if line.startswith("# ")] == [
        r"# Reward model over \*tiny\* \<b\> \`x\` \# Another heading"
    ]


@pytest.mark.usefixtures("ready")
def test_card_names_data_parameters_and_figures() -> None:
    card, metrics = assemble_here(), read_json(export.EVALUATED)
    training = read_json(export.ADAPTER / "training.json")
    assert f"| pairwise accuracy \\(95% interval\\) | {metrics['accuracy']:.4f} " in card
    files = read_json(export.BASE / "base.json")["files"] | training["data"]
    assert all(digest in card for digest in files.values())
    [parameters] = re.findall(r"```json\n(.*?)```", card, re.DOTALL)
    assert json.loads(parameters) == {
        name: training[name] for name in ("quantization", "lora", "train")
    }
