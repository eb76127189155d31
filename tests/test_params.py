"""params.yaml: strict and typed, every key documented, every fault named at once."""

import dataclasses
import itertools
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from ruamel.yaml import YAML

from reward import params
from reward.model.base import Quantization
from reward.model.trainer import Train
from reward.params import Fraction, Positive, Rule
from reward.process import Fault
from stages.evaluate import Evaluate
from stages.export import Export
from stages.fetch import Base
from stages.preprocess import Preprocess
from stages.train import Lora

ROOT = Path(__file__).parent.parent
GROUPS: dict[str, type[Any]] = {
    "base": Base,
    "preprocess": Preprocess,
    "quantization": Quantization,
    "lora": Lora,
    "train": Train,
    "evaluate": Evaluate,
    "export": Export,
}
LINES = (ROOT / "params.yaml").read_text(encoding="utf-8").splitlines()


@dataclass(frozen=True)
class Sample:
    count: Positive
    share: Fraction
    mode: Literal[4, "none"]
    names: Annotated[list[str], Rule("a list of names", bool)]


def load(tmp_path: Path, text: str) -> Sample:
    (tmp_path / "p.yaml").write_text(text, encoding="utf-8")
    return params.load("sample", Sample, tmp_path / "p.yaml")


GOOD = {"count": "3", "share": "1e-05", "mode": "none", "names": "[a, b]"}


def yaml_of(**changes: str | None) -> str:
    values = GOOD | changes
    lines = [f"  {key}: {value}" for key, value in values.items() if value is not None]
    return "\n".join(["sample:", *lines])


def test_values_come_out_typed(tmp_path: Path) -> None:
    assert load(tmp_path, yaml_of()) == Sample(3, 1e-05, "none", ["a", "b"])
    sample = load(tmp_path, yaml_of(share="0", mode="4"))
    assert (type(sample.share), sample.mode) == (float, 4)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("count", "0"),
        ("count", "-1"),
        ("count", "1.0"),
        ("count", "true"),
        ("count", "three"),
        ("count", "null"),
        ("count", "9" * 30),
        ("share", "1"),
        ("share", ".nan"),
        ("share", "text"),
        ("mode", "8"),
        ("mode", "None"),
        ("mode", "4.0"),
        ("names", "[]"),
        ("names", "a"),
        ("names", "[1]"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_wanted(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(Fault, match=rf"sample\.{key} is .*, must be (a|an|one of) "):
        load(tmp_path, yaml_of(**{key: value}))


def test_all_faults_of_a_group_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(Fault) as fault:
        load(tmp_path, yaml_of(count="-1", share=None, cuont="2"))
    assert str(fault.value).splitlines() == [
        f"{tmp_path}/p.yaml: sample.count is -1, must be a positive integer",
        f"{tmp_path}/p.yaml: sample.cuont is unknown, known are count, share, mode, names",
        f"{tmp_path}/p.yaml: sample.share is missing, must be a number from 0 up to, "
        "not including, 1",
    ]


@pytest.mark.parametrize("text", ["", "sample:", "sample: 3", "other: {}", "- sample"])
def test_a_missing_group_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(Fault, match="the group sample is"):
        load(tmp_path, text)


@pytest.mark.parametrize("text", ["sample: [", "sample:\n  count: 1\n  count: 2", "\tsample: 1"])
def test_broken_yaml_is_one_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(Fault, match="broken YAML") as fault:
        load(tmp_path, text)
    assert "\n" not in str(fault.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(Fault, match=r"nothing\.yaml is not here"):
        params.load("sample", Sample, tmp_path / "nothing.yaml")


@pytest.mark.parametrize(("name", "kind"), GROUPS.items())
def test_the_committed_groups_load(name: str, kind: type[Any]) -> None:
    assert dataclasses.is_dataclass(params.load(name, kind, ROOT / "params.yaml"))


def test_every_group_has_a_class_and_every_key_a_field() -> None:
    content = YAML(typ="safe").load(ROOT / "params.yaml")
    fields = {
        name: [field.name for field in dataclasses.fields(kind)] for name, kind in GROUPS.items()
    }
    assert {name: list(group) for name, group in content.items()} == fields


def test_every_key_has_a_sentence_above_it() -> None:
    for above, line in itertools.pairwise(LINES):
        if re.match(r"  [a-z_]+:", line):
            assert re.fullmatch(r"  # [A-Z].*[.]", above), f"no sentence above {line!r}"


def test_params_are_in_block_style_and_unquoted() -> None:
    values = [line for line in LINES if line and not line.lstrip().startswith("#")]
    assert not [line for line in values if re.search(r"""['\[{]""", line)]
    # Without its quotes, a date is no text to DVC.
    for line in (line for line in values if '"' in line):
        [value] = YAML(typ="safe").load(line.replace('"', "")).values()
        assert not isinstance(value, str)


@pytest.mark.parametrize(("name", "kind"), GROUPS.items())
def test_every_key_of_every_group_refuses_a_wrong_type(
    name: str, kind: type[Any], set_params: Callable[..., None]
) -> None:
    for field in typing.get_type_hints(kind):
        set_params(name, **{field: {"a": 1}})
    with pytest.raises(Fault) as fault:
        params.load(name, kind)
    assert len(str(fault.value).splitlines()) == len(dataclasses.fields(kind))
