"""Judging any reward model on the pipeline's test pairs: its rewards, with evaluate's figures."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from reward.data import tokenized
from reward.judging import compare
from reward.outputs import read_json, write_json
from reward.params import read_yaml
from reward.process import Fault
from reward.serving import judge
from tests.support import PARAMS

OUTPUT = Path("reports/judged/merged")

pytestmark = pytest.mark.usefixtures("project")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["judge", *arguments])
    judge.main()


def test_judging_an_exported_model_matches_its_evaluation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Transformers and the exported chat template reproduce the rewards of evaluate."""
    run(monkeypatch, "models/export/merged")
    evaluated = Path("reports/evaluate")
    for file in ("rewards.parquet", "sets/by_hand.parquet"):
        found, expected = (
            pyarrow.parquet.read_table(folder / file) for folder in (OUTPUT, evaluated)
        )
        assert found.column_names == expected.column_names
        for name in found.column_names:
            one, other = found[name].to_pylist(), expected[name].to_pylist()
            rewards = name.startswith("reward_") or name == "margin"
            assert one == (pytest.approx(other, abs=1e-4) if rewards else other), name
    found, expected = (read_json(folder / "figures.json") for folder in (OUTPUT, evaluated))
    for name in ("accuracy", "accuracy_low", "accuracy_high", "pairs"):
        assert found[name] == pytest.approx(expected[name])
    assert found["sets"]["by_hand"]["accuracy"] == expected["sets"]["by_hand"]["accuracy"]
    assert found["sets"]["by_hand"]["leaked"] == 0  # its training data is unknown

    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["compare", str(OUTPUT), "workspace"])
    compare.main()
    printed = capsys.readouterr().out
    assert "the difference may be noise" in printed
    assert f"for {OUTPUT}, " in printed


def test_seed_is_the_default_of_evaluate() -> None:
    assert read_yaml(PARAMS)["evaluate"]["seed"] == judge.SEED


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "mine is a Qwen2ForCausalLM, expected the fold"),
        ({"id2label": {"0": "a", "1": "b"}}, "mine is a classifier with 2 labels, expected one"),
        ({"max_position_embeddings": 10}, "mine reads at most 10 tokens, but answer "),
        ({"_attn_implementation": "some/kernel"}, "mine: config.json names an attention for whi"),
        ({"hidden_size": 16}, "mine has model.embed_tokens.weight of shape ["),
        (
            {"hidden_act": "none"},
            "mine cannot be loaded (KeyError: 'none'), expected the folder of",
        ),
    ],
)
def test_model_that_is_not_a_usable_reward_model_is_refused(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, object], found: str
) -> None:
    shutil.copytree("models/export/merged", "mine")
    config = read_json(Path("mine/config.json"))
    write_json(Path("mine/config.json"), config | change)
    with pytest.raises(Fault) as fault:
        run(monkeypatch, "mine")
    assert found in str(fault.value)


@pytest.mark.parametrize(
    ("folder", "found"),
    [
        ("none", r"none/config\.json cannot be read \(.*No such file.*\), "),
        ("data", r"data/config\.json cannot be read \(.*No such file.*\), "),
        ("models/export", r"models/export is an adapter, which is not judged, "),
    ],
)
def test_folder_that_is_no_model_is_refused(
    monkeypatch: pytest.MonkeyPatch, folder: str, found: str
) -> None:
    expected = r"expected the folder of a sequence classifier, such as \w+"
    with pytest.raises(Fault, match=f"^{found}{expected}") as fault:
        run(monkeypatch, folder)
    assert ("models/export/merged" in str(fault.value)) == (folder == "models/export")


@pytest.mark.parametrize("content", ["[]", "{"])
def test_configuration_that_is_no_object_is_refused(
    monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    Path("mine").mkdir()
    Path("mine/config.json").write_text(content, encoding="utf-8")
    with pytest.raises(Fault, match=r"^mine/config\.json .*, expected the folder of a sequence"):
        run(monkeypatch, "mine")


def test_missing_weights_are_refused() -> None:
    shutil.copytree("models/export/merged", "mine")
    tensors = load_file("mine/model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, "mine/model.safetensors", {"format": "pt"})
    with pytest.raises(
        Fault, match=r"mine is a classifier without a head, expected score\.weight amon"
    ):
        judge.Judge(Path("mine"))


def test_weights_that_the_model_does_not_use_are_refused() -> None:
    """Without the layers above its num_hidden_layers, it would be another model."""
    shutil.copytree("models/export/merged", "mine")
    config = read_json(Path("mine/config.json"))
    fewer = {"num_hidden_layers": 1, "layer_types": config["layer_types"][:1]}
    write_json(Path("mine/config.json"), config | fewer)
    found = (
        r"mine has 12 tensors that a \w+ with its config\.json does not have, such as model\.lay"
    )
    with pytest.raises(Fault, match=found):
        judge.Judge(Path("mine"))


@pytest.mark.parametrize(
    ("file", "content", "found"),
    [
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1\n", "SafetensorError"),
        ("tokenizer.json", "{}", "KeyError: 'added_tokens'"),
    ],
)
def test_broken_download_is_refused(file: str, content: str, found: str) -> None:
    shutil.copytree("models/export/merged", "mine")
    Path("mine", file).write_text(content, encoding="utf-8")
    with pytest.raises(Fault, match=rf"^mine cannot be loaded \({found}.*\), expected the folder"):
        judge.Judge(Path("mine"))


def test_model_that_does_not_fit_in_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    loading = "transformers.AutoModelForSequenceClassification.from_pretrained"
    monkeypatch.setattr(loading, fail)
    with pytest.raises(Fault, match=r"mine does not fit in memory \(CUDA out of memory\.\), expec"):
        judge.Judge(Path("mine"))


def test_chat_template_that_renders_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree("models/export/merged", "mine")
    Path("mine/chat_template.jinja").write_text("{# nothing #}", encoding="utf-8")
    with pytest.raises(Fault, match="mine: its chat template renders nothing for answer 0 of pr"):
        run(monkeypatch, "mine")


def test_extra_set_that_cannot_be_rendered_is_refused_before_anything_is_scored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused = set(
        tokenized.load_answers(Path("data/tokenized/sets/by_hand"), judge.BASE)["prompt_id"]
    )
    ids = judge.Judge.ids

    def render(self: judge.Judge, key: judge.Key, messages: list[dict[str, Any]]) -> list[int]:
        if key[0] in refused:
            raise Fault("no system message")
        return ids(self, key, messages)

    monkeypatch.setattr(judge.Judge, "ids", render)
    monkeypatch.delattr(judge.Judge, "reward")
    with pytest.raises(Fault, match="no system message"):
        run(monkeypatch, "models/export/merged")


def test_tokenizer_with_more_ids_than_the_model_is_refused() -> None:
    judged = judge.Judge(Path("models/export/merged"))
    judged.size = 10
    with pytest.raises(Fault, match=r"has the id \d+, for which the model has no embedding, expe"):
        judged.ids(
            ("p", 0), [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        )


def test_non_finite_rewards_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree("models/export/merged", "mine")
    tensors = load_file("mine/model.safetensors")
    tensors["score.weight"] = torch.full_like(tensors["score.weight"], torch.inf)
    save_file(tensors, "mine/model.safetensors", {"format": "pt"})
    with pytest.raises(Fault, match="answers are not finite, expected a model that can compute"):
        run(monkeypatch, "mine")


def test_tokenizer_without_a_chat_template_is_refused() -> None:
    shutil.copytree("models/export/merged", "mine")
    config = read_json(Path("mine/tokenizer_config.json"))
    del config["chat_template"]
    write_json(Path("mine/tokenizer_config.json"), config)
    with pytest.raises(Fault, match="mine has no chat template, expected one"):
        judge.Judge(Path("mine"))


def test_folder_with_other_files_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Fault, match="--output is data, which has other files, expected a new"):
        run(monkeypatch, "models/export/merged", "--output", "data")
    assert Path("data/raw/pairs.json").exists()


def test_result_of_another_model_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain models of two exports are both in a folder named merged."""
    other = Path(shutil.copytree("models/export/merged", "other/merged"))
    (other / "README.md").write_text("# The same model", encoding="utf-8")
    run(monkeypatch, "models/export/merged")
    run(monkeypatch, str(other))
    tensors = load_file(other / "model.safetensors")
    tensors["score.weight"] *= 2
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    found = (OUTPUT / "figures.json").read_bytes()
    message = f"{OUTPUT} has the rewards of another or an unknown model; remove it, or choose "
    with pytest.raises(Fault, match=f"^{message}another folder with --output$"):
        run(monkeypatch, str(other))
    assert (OUTPUT / "figures.json").read_bytes() == found
    run(monkeypatch, str(other), "--output", "reports/judged/other")
    assert Path("reports/judged/other/figures.json").read_bytes() != found


TURNS = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]


def test_last_id_must_have_an_embedding() -> None:
    judged = judge.Judge(Path("models/export/merged"))
    judged.size = max(judged.ids(("p", 0), TURNS))
    with pytest.raises(Fault, match=r"has the id \d+, for which the model has no embedding"):
        judged.ids(("p", 0), TURNS)


def test_date_of_a_chat_template_is_fixed() -> None:
    shutil.copytree("models/export/merged", "mine")
    template = "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    Path("mine/chat_template.jinja").write_text(template, encoding="utf-8")
    judged = judge.Judge(Path("mine"))
    assert judged.tokenizer.decode(judged.ids(("p", 0), TURNS)) == f"{judge.DATE}?!"
