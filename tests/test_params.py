"""params.yaml: strict and typed, every key documented, all faults named at once."""

import dataclasses
import datetime
import itertools
import math
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from dvc.utils.serialize import load_yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from reward import params
from reward.params import Fraction, Positive, Rule, read_yaml
from reward.process import Fault
from tests.support import GROUPS, ROOT

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


def test_values_are_loaded_typed(tmp_path: Path) -> None:
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
def test_wrong_value_is_named_with_what_is_expected(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(Fault, match=rf"sample\.{key} is .*, must be (a|an|one of) "):
        load(tmp_path, yaml_of(**{key: value}))


def test_all_faults_of_a_group_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(Fault) as fault:
        load(tmp_path, yaml_of(count="-1", share=None, cuont="2"))
    assert str(fault.value).splitlines() == [
        f"{tmp_path}/p.yaml: sample.count is -1, must be a positive integer",
        f"{tmp_path}/p.yaml: sample.cuont is unknown, expected one of count, share, mode, names",
        f"{tmp_path}/p.yaml: sample.share is missing, must be a number from 0 up to "
        "but not including 1",
    ]


@dataclass(frozen=True)
class Current:
    """A group without any removed key."""

    seed: Positive


REPLACED = {
    "base.trust_remote_code": "was removed: code that comes with a model never runs",
    "evaluate.sets": "was renamed to preprocess.sets",
    "export.tokens_per_pack": "was removed: export uses evaluate.tokens_per_pack",
    "preprocess.test_data": "was removed: put files named test* in the folder preprocess.data",
    "train.head_margin": "was removed: the head is always scaled to 0.05",
    "train.head_seed": "was removed: the head uses train.seed",
}


@pytest.mark.parametrize(("key", "replacement"), REPLACED.items())
def test_removed_key_is_named_with_what_replaced_it(
    tmp_path: Path, key: str, replacement: str
) -> None:
    group, _, name = key.partition(".")
    path = tmp_path / "p.yaml"
    path.write_text(f"{group}:\n  seed: 1\n  {name}: 1\n")
    with pytest.raises(Fault) as fault:
        params.load(group, Current, path)
    assert str(fault.value) == f"{path}: {key} {replacement}"


def test_every_removed_key_is_named() -> None:
    assert params.GONE.keys() == REPLACED.keys()


def test_other_unknown_key_is_not_called_removed(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("train:\n  seed: 1\n  sets: 1\n")
    with pytest.raises(Fault, match=r"train\.sets is unknown, expected one of seed"):
        params.load("train", Current, tmp_path / "p.yaml")


@pytest.mark.parametrize("text", ["", "sample:", "sample: 3", "other: {}", "- sample"])
def test_missing_group_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(Fault, match="the group sample is"):
        load(tmp_path, text)


@pytest.mark.parametrize("text", ["sample: [", "sample:\n  count: 1\n  count: 2", "\tsample: 1"])
def test_broken_yaml_is_reported_in_one_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(Fault, match="broken YAML") as fault:
        load(tmp_path, text)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("number", ["0x_", "0b_", "+_", "._", "9" * 5000])
def test_number_without_digits_or_with_too_many_is_broken_yaml(tmp_path: Path, number: str) -> None:
    with pytest.raises(Fault, match="broken YAML"):
        load(tmp_path, yaml_of(count=number))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(Fault, match=r"nothing\.yaml does not exist"):
        params.load("sample", Sample, tmp_path / "nothing.yaml")


@pytest.mark.parametrize(("name", "kind"), GROUPS.items())
def test_committed_groups_load(name: str, kind: type[Any]) -> None:
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


def test_params_are_in_the_style_in_which_dvc_writes_them() -> None:
    """So `dvc exp run -S` changes only the lines of its parameters."""
    values = [line for line in LINES if line and not line.lstrip().startswith("#")]
    assert not [line for line in values if re.search(r"""["\[{]""", line)]
    # DVC fails on a date, so a text that looks like one needs quotes.
    for line in (line for line in values if "'" in line):
        [value] = YAML(typ="safe").load(line.replace("'", "")).values()
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


# --- compatibility with DVC ------------------------------------------------------------------

SCALARS = [
    *("1e-5", "1E5", ".5", "5.", "+1", "-1", "0", "-0", "12e03", "1.e5", ".5e5", ".5e-5", "1_000"),
    *("010", "0o10", "08", "0o8", "0x1f", "-0x1F", "0X1F", "0b1", "0b2", "685_230.15", "_1", "1e"),
    *("1:30", "1:30.5", "190:20:30", "no", "off", "yes", "on", "y", "n", "No", "OFF"),
    *("true", "True", "TRUE", "tRue", "false", "~", "null", "Null", "nULL", "", "<", "0.1.2"),
    *(".inf", "-.INF", "+.Inf", ".iNf", ".nan", "-.nan", ".NaN", "2024-01-01", "2024-1-1"),
    *("2024-01-01T00:00:00Z", "2024-01-01 10:00:00 +2", "q_proj", "embedded/tiny-qwen2"),
    *("'1e-5'", '"1e-5"', "'no'", '"\\u4e2d"', "''", '"null"', "'2024-01-01'", "'<<'", "中文"),
]
Documents = st.recursive(
    st.sampled_from(SCALARS),
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda items: f"[{', '.join(filter(None, items))}]")
        | st.dictionaries(st.sampled_from("abcd"), inner, max_size=4).map(
            lambda items: "{" + ", ".join(f"{key}: {value}" for key, value in items.items()) + "}"
        )
    ),
    max_leaves=8,
)
Flow = st.dictionaries(st.sampled_from("abcd"), st.sampled_from(SCALARS), max_size=3).map(
    lambda items: "{" + ", ".join(f"{key}: {value}" for key, value in items.items()) + "}"
)
one_file = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def same(ours: Any, dvcs: Any) -> bool:
    """Equal in types, values and order, except that our dates are texts."""
    if isinstance(dvcs, datetime.date):
        return isinstance(ours, str) and ours.startswith(str(dvcs.year))
    if type(ours) is not type(dvcs):
        return False
    if isinstance(ours, dict):
        return same([*ours, *ours.values()], [*dvcs, *dvcs.values()])
    if isinstance(ours, list):
        return len(ours) == len(dvcs) and all(map(same, ours, dvcs))
    return bool(ours == dvcs) or (isinstance(ours, float) and math.isnan(ours) and math.isnan(dvcs))


@pytest.mark.parametrize("scalar", SCALARS)
def test_scalars_are_read_as_by_dvc(tmp_path: Path, scalar: str) -> None:
    path = written(tmp_path, f"a: {scalar}\nb:\n  - {scalar}\n  - c: {scalar}\n")
    assert same(read_yaml(path), load_yaml(path))
    if scalar:
        path = written(tmp_path, f"{scalar}: 1\n")
        assert same([*read_yaml(path)], [*load_yaml(path)])


def test_own_keys_override_merged_ones_wherever_they_are_merged(tmp_path: Path) -> None:
    """Some versions of PyYAML prefer the key that comes first, if it is one character long."""
    text = "base: &base {a: 1, b: 2}\nown: &own {<<: *base, b: 3}\nover: {<<: [*own, *base]}\n"
    path = written(tmp_path, text)
    assert read_yaml(path)["over"] == {"a": 1, "b": 3}
    assert same(read_yaml(path), load_yaml(path))


@one_file
@given(
    documents=st.lists(Documents, min_size=1, max_size=3),
    merged=st.lists(Flow, min_size=1, max_size=2),
    own=st.dictionaries(st.sampled_from("abcd"), st.sampled_from(SCALARS), max_size=3),
)
def test_documents_are_read_as_by_dvc(
    tmp_path: Path, documents: list[str], merged: list[str], own: dict[str, str]
) -> None:
    lines = [f"key{index}: &anchor{index} {text}" for index, text in enumerate(documents)]
    lines += [f"again{index}: *anchor{index}" for index in range(len(documents))]
    lines += [f"base{index}: &base{index} {text}" for index, text in enumerate(merged)]
    bases = ", ".join(f"*base{index}" for index in range(len(merged)))
    lines += ["whole: &whole", f"  <<: [{bases}]", *(f"  {key}: {own[key]}" for key in own)]
    lines += ["over: {<<: *whole, a: 1}"]
    path = written(tmp_path, "\n".join(lines))
    assert same(read_yaml(path), load_yaml(path))


@one_file
@given(text=st.text("0179_+-.:eEoxbinfaNlusT~ #'\"=<,[]{}&*|>%@\\\n中", max_size=12))
def test_whatever_both_accept_is_read_the_same(tmp_path: Path, text: str) -> None:
    """The two libraries refuse different texts; in those cases, DVC or the stage stops."""
    path = written(tmp_path, f"a: {text}\nb: [1, {text.strip()}]\n")
    try:
        ours, dvcs = read_yaml(path), load_yaml(path)
    except Exception:
        return
    assert same(ours, dvcs)


@pytest.mark.parametrize("date", ["2024-01-01", "2024-13-45", "2024-01-01T00:00:00Z"])
def test_date_is_read_as_text(tmp_path: Path, date: str) -> None:
    assert read_yaml(written(tmp_path, f"a: {date}\n{date}: b\n")) == {"a": date, date: "b"}


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 1",
        "a: {b: 1, b: 2}",
        "a: [{1: 1, 0x1: 2}]",
        "a: {null: 1, ~: 2}",
        "a: &a {b: 1}\nc: {<<: *a, b: 2, b: 3}",
        "a: &a {b: 1}\nc:\n  <<: *a\n  <<: *a",
    ],
)
def test_duplicate_key_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(yaml.YAMLError, match="found duplicate key"):
        read_yaml(written(tmp_path, text))
