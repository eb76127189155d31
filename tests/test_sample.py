"""The committed sample: reproducible, balanced in length, and without leaks between prompts."""

import importlib.util
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
RAW = ROOT / "data" / "raw"
CORPUS = ROOT / "data" / "corpus"
LANGUAGES = ["en", "zh"]
HAN = re.compile(r"[\u4e00-\u9fff]")
SENTENCE_END = re.compile(r"[.!?。！？…][\"'”’)）]*$")


def load_generator() -> ModuleType:
    """Import data/raw/generate.py, which is not in a package."""
    spec = importlib.util.spec_from_file_location("generate", RAW / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load_generator()
PAIRS: list[dict[str, str]] = json.loads((RAW / "pairs.json").read_text(encoding="utf-8"))


def texts_by_prompt() -> dict[str, set[str]]:
    """The texts of each prompt: the prompt itself and every answer to it."""
    texts: dict[str, set[str]] = defaultdict(set)
    for pair in PAIRS:
        texts[pair["prompt"]] |= {pair["prompt"], pair["chosen"], pair["rejected"]}
    return texts


def corpus_paragraphs(language: str) -> list[str]:
    return (CORPUS / f"{language}.txt").read_text(encoding="utf-8").split("\n\n")


def han_share(text: str) -> float:
    return len(HAN.findall(text)) / len(text)


def share_of_longer(pairs: list[dict[str, str]]) -> float:
    """How often the longer answer is the chosen one."""
    return sum(len(pair["chosen"]) > len(pair["rejected"]) for pair in pairs) / len(pairs)


def test_generator_reproduces_the_committed_file() -> None:
    written = generate.sample(RAW / "prompts")
    assert written.encode() == (RAW / "pairs.json").read_bytes()


def test_sample_is_large_and_bilingual() -> None:
    prompts = {pair["prompt"]: pair["language"] for pair in PAIRS}
    assert len(PAIRS) >= 1000
    assert len(prompts) >= 200
    assert min(Counter(prompts.values())[language] for language in LANGUAGES) >= 100
    assert set(prompts.values()) == set(LANGUAGES)


def test_prompts_have_five_to_seven_pairs_and_use_both_good_answers() -> None:
    sizes = Counter(pair["prompt"] for pair in PAIRS)
    chosen = defaultdict(set)
    for pair in PAIRS:
        chosen[pair["prompt"]].add(pair["chosen"])
    assert set(sizes.values()) <= {5, 6, 7}
    assert {len(answers) for answers in chosen.values()} == {2}


def test_kinds_are_evenly_distributed() -> None:
    counts = Counter((pair["language"], pair["kind"]) for pair in PAIRS)
    assert set(counts) == {(language, kind) for language in LANGUAGES for kind in generate.KINDS}
    assert min(counts.values()) >= 40


@pytest.mark.parametrize("languages", [["en"], ["zh"], LANGUAGES])
def test_length_does_not_predict_the_better_answer(languages: list[str]) -> None:
    share = share_of_longer([pair for pair in PAIRS if pair["language"] in languages])
    assert 0.45 <= share <= 0.55


def test_no_record_repeats_or_contradicts_another() -> None:
    records = {(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in PAIRS}
    assert len(records) == len(PAIRS)
    chosen = {(pair["prompt"], pair["chosen"]) for pair in PAIRS}
    rejected = {(pair["prompt"], pair["rejected"]) for pair in PAIRS}
    assert not chosen & rejected


def test_wrong_language_answers_are_in_the_other_language() -> None:
    for pair in PAIRS:
        if pair["kind"] == "wrong_language":
            own, other = han_share(pair["chosen"]), han_share(pair["rejected"])
            assert own > other if pair["language"] == "zh" else own < other, pair


def test_cut_off_answers_do_not_end_a_sentence() -> None:
    cut_off = [pair["rejected"] for pair in PAIRS if pair["kind"] == "cut_off"]
    assert [answer for answer in cut_off if SENTENCE_END.search(answer)] == []


def test_no_text_is_used_for_two_prompts() -> None:
    """So no run of eight words appears in two splits, whatever the seed of the split."""
    assert generate.shared_runs(texts_by_prompt()) == []
    owners = Counter(text for texts in texts_by_prompt().values() for text in texts)
    assert [text for text, count in owners.items() if count > 1] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_run_of_words_in_the_sample_appears_in_the_corpus(language: str) -> None:
    sample = [text for texts in texts_by_prompt().values() for text in texts]
    sources = {"sample": sample, "corpus": corpus_paragraphs(language)}
    assert generate.shared_runs(sources) == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_prompt_appears_in_the_corpus(language: str) -> None:
    corpus = f" {' '.join(generate.words(' '.join(corpus_paragraphs(language))))} "
    prompts = [" ".join(generate.words(prompt)) for prompt in texts_by_prompt()]
    assert [prompt for prompt in prompts if f" {prompt} " in corpus] == []


def test_shared_runs_finds_runs_across_punctuation_and_case() -> None:
    texts = {"a": ["One, two three. FOUR five six"], "b": ["two three four; five"], "c": ["six"]}
    assert generate.shared_runs(texts, length=4) == [("two three four five", "a", "b")]
    assert generate.shared_runs({"a": ["天空为什么蓝？"], "b": ["问：天空，为什么"]}, length=5) == [
        ("天 空 为 什 么", "a", "b")
    ]
    assert generate.shared_runs({"a": ["Yes, sir."], "b": ["yes sir"]}) == [("yes sir", "a", "b")]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"full": ""}, "lacks full"),
        ({"rude": "Add salt, then wait."}, "gives one text twice"),
        ({"full": "No such place."}, "no place to cut it off"),
    ],
)
def test_faulty_entries_are_refused(texts: dict[str, str], message: str, tmp_path: Path) -> None:
    entry = {key: f"Text for {key}." for key in generate.Entry._fields}
    entry |= {"short": "Add salt, then wait.", "full": "Take the pan off the heat. Wait. Serve."}
    source = tmp_path / "en-test.yaml"
    source.write_text(json.dumps([entry | texts]), encoding="utf-8")
    with pytest.raises(SystemExit, match=message):
        generate.sample(tmp_path)


def test_entries_that_share_text_are_refused(tmp_path: Path) -> None:
    entry = {key: f"Text for {key}." for key in generate.Entry._fields}
    entry |= {"full": "Take the pan off the heat. Wait. Serve."}
    source = tmp_path / "en-test.yaml"
    source.write_text(json.dumps([entry, entry]), encoding="utf-8")
    with pytest.raises(SystemExit, match="occurs 2 times"):
        generate.sample(tmp_path)
    source.write_text(json.dumps([entry, entry | {"prompt": "Another?"}]), encoding="utf-8")
    with pytest.raises(SystemExit, match="share the words"):
        generate.sample(tmp_path)
