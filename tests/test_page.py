"""The page of judgements: what it holds, and how it behaves in a browser."""

import json
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pytest
from tokenizers import Tokenizer

from stages import page
from stages.tokens import TEMPLATES, Template

from .browser import Browser

ZH = Template(TEMPLATES["zh"], False, 2040, "")
NONE = Template(TEMPLATES["none"], False, 2040, "")
CHAT = Template("chat", True, 2040, "")
HOSTILE = '</script><script>document.title="broken"</script><img src=x onerror="alert(1)"> & <b>'


@pytest.mark.parametrize(
    ("template", "chosen", "rejected", "wanted"),
    [
        (ZH, "问:你好\n\n答:好的", "问:你好\n\n答:好坏", ("你好", "好的", "好坏")),
        (ZH, "问:a\n\n答:b\n\n答:c", "问:a\n\n答:b\n\n答:d", ("a\n\n答:b", "c", "d")),
        (
            ZH,
            "cut off: no head\n\n答:x",
            "cut off: no head\n\n答:y",
            ("cut off: no head", "x", "y"),
        ),
        (
            NONE,
            "\n\nHuman: q\n\nAssistant: yes",
            "\n\nHuman: q\n\nAssistant: no",
            ("\n\nHuman: q\n\nAssistant:", " yes", " no"),
        ),
        (
            CHAT,
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nyes",
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nno",
            ("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "yes", "no"),
        ),
        (NONE, "one", "two", ("", "one", "two")),
    ],
)
def test_texts_are_split_where_an_answer_can_begin(
    template: Template, chosen: str, rejected: str, wanted: tuple[str, str, str]
) -> None:
    assert page.split(template, chosen, rejected) == wanted


def write(folder: Path, base: Path, texts: list[tuple[str, str, str]]) -> Path:
    """The page of pairs of these texts; the first is the most confidently wrong one."""
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    margins = [index - len(texts) / 3 for index in range(len(texts))]
    table = pa.table(
        {
            "id": [f"id{index}" for index in range(len(texts))],
            "reward_chosen": margins,
            "reward_rejected": [0.0] * len(texts),
            "margin": margins,
            "tokens_chosen": [len(chosen) for _, chosen, _ in texts],
            "tokens_rejected": [len(rejected) for *_, rejected in texts],
            "kind": ["odd" if index % 2 else "even & <b>" for index in range(len(texts))],
        }
    )
    ids = [
        tuple(tokenizer.encode(f"问:{prompt}\n\n答:{answer}").ids for answer in answers)
        for prompt, *answers in texts
    ]
    path = folder / "index.html"
    page.write(path, table, ids, base, ZH, {"kind": ["even & <b>", "odd"]})  # type: ignore[arg-type]
    return path


def some(count: int) -> list[tuple[str, str, str]]:
    named = [("怎么煮鸡蛋？", "冷水下锅。", "不知道。"), (HOSTILE, HOSTILE + "1", "2" + HOSTILE)]
    more = [(f"Question {n}?", f"good {n}", f"bad {n}") for n in range(count - 2)]
    return named + more


class Finder(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_is_whole_in_itself_and_holds_texts_as_texts(
    tmp_path: Path, tiny_base: Path
) -> None:
    path = write(tmp_path, tiny_base, some(12))
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
    pairs = json.loads(data[1])["pairs"]
    assert [each["id"] for each in pairs] == [f"id{index}" for index in range(12)]
    assert pairs[1]["prompt"] == HOSTILE
    assert pairs[0]["chosen"] == "冷水下锅。"


def test_of_many_pairs_the_worst_are_kept(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "MOST_PAIRS", 5)
    content = write(tmp_path, tiny_base, some(12)).read_text(encoding="utf-8")
    assert '"summary": "5 of 12 test pairs"' in content
    assert '"id4"' in content
    assert '"id5"' not in content


# --- in a browser ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser, tmp_path: Path, tiny_base: Path) -> Iterator[Browser]:
    """The page of 30 pairs in a browser, which must have nothing to complain of at the end."""
    chromium.errors.clear()
    chromium.requests.clear()
    chromium.open(write(tmp_path, tiny_base, some(30)))
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
    """The id of the pair that is shown."""
    found: str = browser.run(
        "[...document.querySelectorAll('dl div')].find(e => e.firstChild.textContent === 'id')"
        ".lastChild.textContent"
    )
    return found


@pytest.mark.browser
def test_the_most_confidently_wrong_pair_comes_first_with_both_answers(browser: Browser) -> None:
    assert shown(browser) == "id0"
    assert text(browser, "#count") == "30 of 30 pairs"
    found = browser.run("[...document.querySelectorAll('.text')].map(e => e.textContent)")
    assert found == ["怎么煮鸡蛋？", "冷水下锅。", "不知道。"]
    assert "reward −10.000" in text(browser, ".sides")
    assert "preferred by the model" in text(browser, ".sides .higher")


@pytest.mark.browser
def test_text_that_is_html_is_shown_as_text(browser: Browser) -> None:
    browser.press("j")
    assert shown(browser) == "id1"
    assert text(browser, "article .text") == HOSTILE
    assert browser.run("document.querySelectorAll('img, b.x').length") == 0
    assert browser.run("document.title") == "Judgements of the reward model"


@pytest.mark.browser
def test_keys_go_to_the_next_the_previous_and_the_search(browser: Browser) -> None:
    for key, wanted in (
        *(("j", "id1"), ("ArrowDown", "id2"), ("k", "id1"), ("ArrowUp", "id0"), ("k", "id0")),
        *(("End", "id29"), ("j", "id29"), ("Home", "id0"), ("PageDown", "id10")),
    ):
        browser.press(key)
        assert shown(browser) == wanted
        selected = browser.run("document.querySelector('[aria-selected=true]').id")
        assert selected == f"row-{int(wanted[2:])}"
    browser.press("/")
    browser.type("QUESTION 28")
    assert text(browser, "#count") == "1 of 30 pairs"
    assert shown(browser) == "id28"
    browser.press("j")
    assert text(browser, "#count") == "0 of 30 pairs"
    browser.press("Escape")
    assert browser.run("document.activeElement === document.body") is True


@pytest.mark.browser
def test_search_filters_and_order_work_together(browser: Browser) -> None:
    choose(browser, "#search", "煮鸡蛋")
    assert (text(browser, "#count"), shown(browser)) == ("1 of 30 pairs", "id0")
    choose(browser, "#search", "")
    choose(browser, "#outcome", "wrong")
    assert text(browser, "#count") == "10 of 30 pairs"
    choose(browser, "#outcome", "tie")
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
    assert "No pair is like that" in text(browser, "#pair")


@pytest.mark.browser
@pytest.mark.parametrize(("width", "columns"), [(1280, 2), (500, 1)])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_wide_and_narrow_light_and_dark(
    browser: Browser, tmp_path: Path, width: int, columns: int, dark: bool
) -> None:
    browser.open(tmp_path / "index.html", width, 800, dark)
    assert browser.run("document.documentElement.scrollWidth") <= width
    places = browser.run("[...document.querySelectorAll('.sides > *')].map(e => e.offsetLeft)")
    assert len(set(places)) == columns
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 200) is dark


@pytest.mark.browser
def test_thousands_of_pairs_stay_quick(chromium: Browser, tmp_path: Path, tiny_base: Path) -> None:
    path = write(tmp_path, tiny_base, some(8000))
    begun = time.monotonic()
    chromium.open(path)
    assert time.monotonic() - begun < 5
    assert text(chromium, "#count") == "8000 of 8000 pairs"
    assert chromium.run("document.querySelectorAll('.row').length") < 60
    script = """{const begun = performance.now(); const it = document.querySelector("#search");
    it.value = "question 77"; it.dispatchEvent(new Event("input", {bubbles: true}));
    performance.now() - begun}"""
    assert chromium.run(script) < 500
    assert text(chromium, "#count").endswith("of 8000 pairs")
