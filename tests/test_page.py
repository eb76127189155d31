"""The page of judgements: its content, and its behaviour in a browser."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pytest

from reward.judging import page
from reward.judging.page import Prompt
from tools.browser import Browser

HOSTILE = '</script><script>document.title="broken"</script><img src=x onerror="alert(1)"> & <b>'


def write(
    folder: Path,
    texts: list[tuple[str, str, str]],
    scale: float = 1.0,
    filler: str = "",
) -> Path:
    """Write the page for pairs of these texts; the first is the most confidently wrong one.

    The filler is appended to each prompt and chosen answer.
    """
    margins = [scale * (index - len(texts) / 3) for index in range(len(texts))]
    table = pa.table(
        {
            "id": [f"id{index}" for index in range(len(texts))],
            "reward_chosen": margins,
            "reward_rejected": [0.0] * len(texts),
            "margin": margins,
            "tokens_chosen": [len(chosen) for _, chosen, _ in texts],
            "tokens_rejected": [len(rejected) for *_, rejected in texts],
            "preference": [1.0] * len(texts),
            "answer_j": [0] * len(texts),
            "answer_k": [1] * len(texts),
            "prompt_id": [f"prompt{index}" for index in range(len(texts))],
            "kind": ["odd" if index % 2 else "even & <b>" for index in range(len(texts))],
            "test set": ["mine"] * len(texts),
        }
    )
    prompts = {
        ("mine", f"prompt{index}"): Prompt(prompt + filler, {0: chosen + filler, 1: rejected})
        for index, (prompt, chosen, rejected) in enumerate(texts)
    }
    path = folder / "index.html"
    page.write(path, table, prompts, {"kind": ["even & <b>", "odd"]})
    return path


def write_ranking(folder: Path) -> Path:
    """Write the page for a prompt with four answers and another with two, both with the same id."""
    compared = [(2, 0, 1.0), (2, 3, 0.75), (0, 3, 1.0), (1, 3, 0.5)]
    rewards, sizes = [1.0, -2.0, 0.5, 2.5], [10, 20, 30, 40]
    table = pa.table(
        {
            "id": [f"{j}{k}" for j, k, _ in compared] + ["other"],
            "reward_chosen": [rewards[j] for j, *_ in compared] + [7.0],
            "reward_rejected": [rewards[k] for _, k, _ in compared] + [7.0],
            "margin": [rewards[j] - rewards[k] for j, k, _ in compared] + [0.0],
            "tokens_chosen": [sizes[j] for j, *_ in compared] + [1],
            "tokens_rejected": [sizes[k] for _, k, _ in compared] + [2],
            "preference": [preference for *_, preference in compared] + [1.0],
            "answer_j": [j for j, *_ in compared] + [1],
            "answer_k": [k for _, k, _ in compared] + [0],
            "prompt_id": ["same"] * 5,
            "test set": ["mine"] * 4 + ["yours"],
        }
    )
    prompts = {
        ("mine", "same"): Prompt("Which?", {number: f"answer {number}" for number in range(4)}),
        ("yours", "same"): Prompt("And here?", {0: "worse", 1: "better"}),
        ("yours", "not judged"): Prompt("Nothing?", {0: "not", 1: "shown"}),
    }
    path = folder / "index.html"
    page.write(path, table, prompts, {})
    return path


def texts_of_pairs(count: int) -> list[tuple[str, str, str]]:
    named = [("怎么煮鸡蛋？", "冷水下锅。", "不知道。"), (HOSTILE, HOSTILE + "1", "2" + HOSTILE)]
    more = [(f"Question {n}?", f"good {n}", f"bad {n}") for n in range(count - 2)]
    return named + more


class Finder(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_page_is_self_contained_and_escapes_texts(tmp_path: Path) -> None:
    path = write(tmp_path, texts_of_pairs(12))
    content = path.read_text(encoding="utf-8")
    finder = Finder()
    finder.feed(content)
    tags = [tag for tag, _ in finder.found]
    assert tags.count("script") == 2
    assert "img" not in tags
    for _, attributes in finder.found:
        assert not {"src", "onerror"} & attributes.keys()
        assert attributes.get("href", "data:,") == "data:,"
    assert not re.search(r"https?://", content)
    data = re.search(r'id="data">(.*?)</script>', content, re.DOTALL)
    assert data
    pairs, prompts = (json.loads(data[1])[name] for name in ("pairs", "prompts"))
    assert [each["id"] for each in pairs] == [f"id{index}" for index in range(12)]
    assert [each["prompt"] for each in pairs] == list(range(12))
    assert prompts[1]["text"] == HOSTILE
    assert prompts[0]["answers"][0] == {
        "number": 0,
        "text": "冷水下锅。",
        "reward": -4,
        "tokens": 5,
    }


def test_each_text_is_stored_once_however_often_it_is_compared(tmp_path: Path) -> None:
    content = write_ranking(tmp_path).read_text(encoding="utf-8")
    for shown in ("Which?", *(f"answer {number}" for number in range(4)), "And here?"):
        assert content.count(f'"{shown}"') == 1
    assert "Nothing?" not in content


def test_ties_count_as_zero_margin_when_pairs_are_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "MOST_PAIRS", 3)
    content = write_ranking(tmp_path).read_text(encoding="utf-8")
    assert re.findall(r'"id": "(\w+)"', content) == ["23", "03", "20"]


def test_text_counts_once_toward_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["Which?", *(f"answer {number}" for number in range(4)), "And here?", "worse", "better"]
    monkeypatch.setattr(page, "MOST_CHARACTERS", len("".join(texts)))
    assert '"summary": "5 test pairs"' in write_ranking(tmp_path).read_text(encoding="utf-8")


def test_small_margins_are_not_equal_rewards(tmp_path: Path) -> None:
    content = write(tmp_path, texts_of_pairs(12), scale=1e-9).read_text(encoding="utf-8")
    assert content.count('"margin": 0') == 1
    assert '"margin": -4e-09' in content


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("MOST_PAIRS", 5),
        ("MOST_CHARACTERS", sum(len("".join(texts)) for texts in texts_of_pairs(5))),
    ],
)
def test_worst_pairs_are_kept_when_pairs_are_limited(
    name: str, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, name, limit)
    content = write(tmp_path, texts_of_pairs(12)).read_text(encoding="utf-8")
    assert '"summary": "the 5 with the lowest margins of 12 test pairs"' in content
    assert '"id4"' in content
    assert '"id5"' not in content


# --- in a browser ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser, tmp_path: Path) -> Iterator[Browser]:
    """The page of 30 pairs in a browser, which must report no errors at the end."""
    chromium.errors.clear()
    chromium.requests.clear()
    chromium.open(write(tmp_path, texts_of_pairs(30)))
    yield chromium
    assert chromium.errors == []
    assert {url.partition(":")[0] for url in chromium.requests} <= {"file", "data"}


def text(browser: Browser, selector: str) -> str:
    return str(browser.run(f"document.querySelector({json.dumps(selector)}).textContent"))


def choose(browser: Browser, selector: str, value: str) -> None:
    browser.run(
        f"{{const it = document.querySelector({json.dumps(selector)}); it.value = "
        f"{json.dumps(value)}; it.dispatchEvent(new Event('input', {{bubbles: true}}))}}"
    )


def shown(browser: Browser) -> str:
    """The id of the displayed pair."""
    found: str = browser.run(
        "[...document.querySelectorAll('dl div')].find(e => e.firstChild.textContent === 'id')"
        ".lastChild.textContent"
    )
    return found


@pytest.mark.browser
def test_most_confidently_wrong_pair_comes_first_with_both_answers(browser: Browser) -> None:
    assert shown(browser) == "id0"
    assert text(browser, "#count") == "30 of 30 pairs"
    found = browser.run("[...document.querySelectorAll('.text')].map(e => e.textContent)")
    assert found == ["怎么煮鸡蛋？", "冷水下锅。", "不知道。"]
    assert "reward −10.000" in text(browser, ".sides")
    assert "preferred by the model" in text(browser, ".sides .higher")


def answers_shown(browser: Browser) -> list[list[str]]:
    """The heading and text of each answer, in page order."""
    found: list[list[str]] = browser.run(
        "[...document.querySelectorAll('.sides > *')].map(e => "
        "[e.querySelector('h2').textContent, e.querySelector('.text').textContent])"
    )
    return found


@pytest.mark.browser
def test_all_answers_to_a_prompt_are_sorted_by_reward(chromium: Browser, tmp_path: Path) -> None:
    chromium.open(write_ranking(tmp_path))
    assert (shown(chromium), text(chromium, ".row b")) == ("23", "−2.000")
    assert text(chromium, "dl").endswith("preference0.750")
    assert answers_shown(chromium) == [
        ["rejected: reward +2.500, 40 tokens with the prompt · preferred by the model", "answer 3"],
        ["another answer: reward +1.000, 10 tokens with the prompt", "answer 0"],
        ["chosen: reward +0.500, 30 tokens with the prompt", "answer 2"],
        ["another answer: reward −2.000, 20 tokens with the prompt", "answer 1"],
    ]
    assert (
        len(
            set(chromium.run("[...document.querySelectorAll('.sides > *')].map(e => e.offsetLeft)"))
        )
        > 1
    )


@pytest.mark.browser
def test_tie_is_sorted_between_wrong_and_correct_pairs(chromium: Browser, tmp_path: Path) -> None:
    chromium.open(write_ranking(tmp_path))
    margins = "[...document.querySelectorAll('.row b')].map(e => e.textContent)"
    assert chromium.run(margins) == ["−2.000", "−1.500", "−0.500", "±4.500", "+0.000"]
    choose(chromium, "#outcome", "tie")
    assert (text(chromium, "#count"), shown(chromium)) == ("1 of 5 pairs", "13")
    assert "judgeda tie" in text(chromium, "dl")
    assert [head.split(":")[0] for head, _ in answers_shown(chromium)] == [
        "tied",
        *["another answer"] * 2,
        "tied",
    ]
    choose(chromium, "#outcome", "equal")
    assert shown(chromium) == "other"
    assert answers_shown(chromium) == [
        ["chosen: reward +7.000, 1 tokens with the prompt", "better"],
        ["rejected: reward +7.000, 2 tokens with the prompt", "worse"],
    ]


@pytest.mark.browser
def test_html_in_texts_is_shown_as_text(browser: Browser) -> None:
    browser.press("j")
    assert shown(browser) == "id1"
    assert text(browser, "article .text") == HOSTILE
    assert browser.run("document.querySelectorAll('img, b.x').length") == 0
    assert browser.run("document.title") == "Judgements of the reward model"


@pytest.mark.browser
def test_keys_move_between_pairs_and_to_the_search(browser: Browser) -> None:
    for key, expected in (
        *(("j", "id1"), ("ArrowDown", "id2"), ("k", "id1"), ("ArrowUp", "id0"), ("k", "id0")),
        *(("End", "id29"), ("j", "id29"), ("Home", "id0")),
    ):
        browser.press(key)
        assert shown(browser) == expected
        selected = browser.run("document.querySelector('[aria-selected=true]').id")
        assert selected == f"row-{int(expected[2:])}"
    browser.press("/")
    browser.type("QUESTION 28")
    assert text(browser, "#count") == "1 of 30 pairs"
    assert shown(browser) == "id28"
    browser.press("j")
    assert text(browser, "#count") == "0 of 30 pairs"
    browser.press("Escape")
    assert browser.run("document.activeElement === document.body") is True


@pytest.mark.browser
def test_keys_work_after_choosing_a_filter_and_do_not_change_it(browser: Browser) -> None:
    browser.run("document.querySelector('#outcome').focus()")
    choose(browser, "#outcome", "wrong")
    for key, expected in (("j", "id1"), ("j", "id2"), ("k", "id1")):
        browser.press(key)
        assert (shown(browser), text(browser, "#count")) == (expected, "10 of 30 pairs")


@pytest.mark.browser
def test_page_keys_scroll_a_long_pair(chromium: Browser, tmp_path: Path) -> None:
    chromium.open(write(tmp_path, [("q", "a\n" * 200, "b\n" * 200)] * 3))
    scrolled = "document.querySelector('#pair').scrollTop"
    chromium.press("PageDown")
    assert chromium.run(scrolled) > 100
    chromium.press("PageUp")
    assert chromium.run(scrolled) == 0
    assert shown(chromium) == "id0"


@pytest.mark.browser
def test_search_filters_and_order_work_together(browser: Browser) -> None:
    choose(browser, "#search", "煮鸡蛋")
    assert (text(browser, "#count"), shown(browser)) == ("1 of 30 pairs", "id0")
    choose(browser, "#search", "")
    choose(browser, "#outcome", "wrong")
    assert text(browser, "#count") == "10 of 30 pairs"
    choose(browser, "#outcome", "tie")
    assert text(browser, "#count") == "0 of 30 pairs"
    choose(browser, "#outcome", "equal")
    assert (text(browser, "#count"), shown(browser)) == ("1 of 30 pairs", "id10")
    choose(browser, "#outcome", "right")
    choose(browser, "#sort", "down")
    assert (text(browser, "#count"), shown(browser)) == ("19 of 30 pairs", "id29")
    choose(browser, "[data-slice=kind]", "1")
    assert (text(browser, "#count"), shown(browser)) == ("9 of 30 pairs", "id28")
    choose(browser, "#sort", "near")
    assert shown(browser) == "id12"
    choose(browser, "#search", "no such words")
    assert text(browser, "#count") == "0 of 30 pairs"
    assert "No pairs match" in text(browser, "#pair")


@pytest.mark.browser
@pytest.mark.parametrize(("width", "columns"), [(1280, 2), (500, 1)])
@pytest.mark.parametrize("dark", [False, True])
def test_layout_fits_wide_and_narrow_light_and_dark(
    browser: Browser, tmp_path: Path, width: int, columns: int, dark: bool
) -> None:
    browser.open(tmp_path / "index.html", width, 800, dark)
    assert browser.run("document.documentElement.scrollWidth") <= width
    places = browser.run("[...document.querySelectorAll('.sides > *')].map(e => e.offsetLeft)")
    assert len(set(places)) == columns
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 200) is dark


@pytest.mark.browser
def test_work_per_keystroke_is_small_with_thousands_of_pairs(
    browser: Browser, tmp_path: Path
) -> None:
    """5 KB of text per pair, 20 MB in total, of which a keystroke converts and shows little."""
    browser.open(write(tmp_path, texts_of_pairs(4000), filler=" word" * 500))
    assert text(browser, "#count") == "4000 of 4000 pairs"
    assert browser.run("document.querySelectorAll('.row').length") < 60
    assert browser.run("document.querySelectorAll('*').length") < 300
    script = """{let elements = 0, characters = 0;
    const create = document.createElement, lower = String.prototype.toLowerCase;
    document.createElement = function (name) { elements++; return create.call(this, name); };
    String.prototype.toLowerCase = function () {
      characters += this.length; return lower.call(this);
    };
    const it = document.querySelector("#search"); it.value = "question 77";
    it.dispatchEvent(new Event("input", {bubbles: true}));
    ({elements, characters})}"""
    work = browser.run(script)
    assert 0 < work["elements"] < 250
    assert work["characters"] == len("question 77")
    assert text(browser, "#count") == "120 of 4000 pairs"
