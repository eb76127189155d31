"""The embedded model: a real Qwen2 with the same bytes for the same seed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from reward.model import embedded
from reward.outputs import digests, read_json
from reward.process import Fault
from stages import fetch
from tests.support import SetParams

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Two short steps and a small vocabulary, because these tests hold at any size."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"VOCABULARY": 512, "STEPS": 2, "ROWS": 2, "LENGTH": 16}.items():
            patch.setattr(embedded, name, value)
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three models: two with seed 0, one with seed 1."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("one", "same", "other")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name, folder in folders.items():
            embedded.build(folder, seed=int(name == "other"))
    return folders


def test_same_seed_gives_the_same_bytes(built: dict[str, Path]) -> None:
    assert digests(built["one"]) == digests(built["same"])


def test_another_seed_changes_only_the_weights(built: dict[str, Path]) -> None:
    one, other = digests(built["one"]), digests(built["other"])
    assert {name for name in one if one[name] != other[name]} == {"model.safetensors"}
    assert one.keys() == other.keys()


def test_fetch_builds_the_model_with_its_seed_and_records_it(
    built: dict[str, Path], set_params: SetParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: list[Path] = []
    monkeypatch.setattr(embedded, "CORPUS", ROOT / embedded.CORPUS)
    monkeypatch.setattr(fetch, "reads", watched.append)
    set_params("base", seed=1)
    fetch.main()
    assert watched == [embedded.CORPUS]
    base = read_json(fetch.BASE / "base.json")
    (fetch.BASE / "base.json").unlink()
    assert base == {
        "name": embedded.NAME,
        "kind": "embedded",
        "revision": "seed 1",
        "license": {"license": "apache-2.0"},
        "files": digests(fetch.BASE),
    }
    other = digests(built["other"])
    assert base["files"].keys() == other.keys()
    assert base["files"]["model.safetensors"] == other["model.safetensors"]


def test_no_file_names_a_library_version(built: dict[str, Path]) -> None:
    assert "transformers_version" not in read_json(built["one"] / "config.json")


def test_only_the_result_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import logging

    monkeypatch.chdir(ROOT)
    logging.enable_progress_bar()
    embedded.build(tmp_path, seed=0)
    out, err = capfd.readouterr()
    assert out.startswith(f"{embedded.NAME}: 2 steps of pretraining, last loss ")
    assert out.count("\n") == 1
    assert err == ""


def test_model_loads_as_a_working_qwen2(built: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

    model = AutoModelForCausalLM.from_pretrained(built["one"])
    tokenizer = AutoTokenizer.from_pretrained(built["one"])
    ids = torch.tensor([tokenizer("问:What is it?\n\n答:")["input_ids"]])
    assert isinstance(model, Qwen2ForCausalLM)
    assert model.config.vocab_size >= len(tokenizer)
    assert model(input_ids=ids).logits.isfinite().all()


def test_pretraining_lowers_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = ["The moon is round. " * 4] * 8
    tokenizer = embedded.train_tokenizer(corpus)
    losses = []
    for steps in (1, 12):
        monkeypatch.setattr(embedded, "STEPS", steps)
        model = embedded.pretrain(corpus, tokenizer, seed=0)
        rows = next(embedded.batches(corpus, tokenizer, 0, torch.Generator().manual_seed(1)))
        losses.append(model(input_ids=rows, labels=rows).loss.item())
    assert losses[1] < losses[0] / 2


def test_training_the_tokenizer_is_deterministic(built: dict[str, Path]) -> None:
    corpus = embedded.paragraphs(ROOT / embedded.CORPUS)
    again = embedded.train_tokenizer(corpus).to_str(pretty=True)
    assert again == (built["one"] / "tokenizer.json").read_text(encoding="utf-8")


def test_tokenizer_round_trips_any_text(built: dict[str, Path]) -> None:
    tokenizer = Tokenizer.from_file(str(built["one"] / "tokenizer.json"))
    for text in ("问:你好,12 + 30?\n\n答: 42", " \t two  spaces\r\n", "👩‍👩‍👧 ∮ ﷽ \x00"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_auto_tokenizer_loads_the_trained_tokenizer(built: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(built["one"])
    saved = Tokenizer.from_file(str(built["one"] / "tokenizer.json"))
    text = "<|im_start|>user\nIt's 1234 o'clock, 四点。<|im_end|>\n"
    assert loaded(text)["input_ids"] == saved.encode(text).ids
    assert (loaded.eos_token, loaded.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    messages = [{"role": "user", "content": "hi"}]
    chat = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_batches_use_every_paragraph_once_before_repeating_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    corpus = [f"Paragraph number {number}" for number in range(6)]
    tokenizer = embedded.train_tokenizer(corpus)
    end = tokenizer.encode("<|endoftext|>").ids[0]
    lengths = sum(len(tokenizer.encode(text).ids) + 1 for text in corpus)
    monkeypatch.setattr(embedded, "ROWS", 1)
    monkeypatch.setattr(embedded, "LENGTH", lengths)
    batches = embedded.batches(corpus, tokenizer, end, torch.Generator().manual_seed(0))
    orders = []
    for _ in range(2):
        text = tokenizer.decode(next(batches)[0].tolist(), skip_special_tokens=False)
        orders.append(text.split("<|endoftext|>")[:-1])
        assert sorted(orders[-1]) == sorted(corpus)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("content", [None, " \n\n "])
def test_corpus_without_text_is_a_fault(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "en.txt").write_text(content)
    with pytest.raises(Fault, match=r"has no .txt files with text, expected the corpus"):
        embedded.paragraphs(tmp_path)
