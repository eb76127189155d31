"""How fast preprocess is compared with the bare tokenizer, and how its time and memory grow.

    python -m benchmarks.preprocess

The stage alternates with a plain `encode_batch` over the texts that it renders, each in a fresh
process, and results are medians. Then the stage runs on growing numbers of pairs of short texts.
Prints the figures and writes them to benchmarks/results/preprocess.md.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer

from benchmarks.markdown import table
from reward.data.reading import read
from reward.data.records import check
from reward.data.tokens import Encoder, Template
from reward.outputs import read_json
from reward.process import Fault, command_line, run

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "preprocess.md"
BASE = Path("models/base")
PAIRS = Path("pairs.jsonl")
CHAT = Path("chat.jinja")
# Turns between markers, as in the chat templates of many models.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content | trim + '<|im_end|>\n' }}
{%- endfor %}
"""
TEMPLATES = ("zh", "chat")
STAGE = ("-m", "stages.preprocess")
# Includes datasets, which the stage imports only when it writes.
START_UP = ("-c", "import stages.preprocess, datasets")
NONE = "–"
# Texts per call of encode_batch; the comparison uses the fastest.
BATCHES = (1_000, 10_000, 100_000)


@dataclass(frozen=True)
class Sentences:
    """The maximum number of sentences in a generated prompt and answer; the minimum is one."""

    prompt: int
    answer: int


LONG, SHORT = Sentences(4, 10), Sentences(1, 1)


@dataclass(frozen=True)
class Usage:
    """The cost of a process: wall-clock seconds, processor seconds, and peak bytes."""

    seconds: float
    processor: float
    memory: float

    def __sub__(self, other: "Usage") -> "Usage":
        return Usage(
            self.seconds - other.seconds,
            self.processor - other.processor,
            self.memory - other.memory,
        )


@dataclass(frozen=True)
class Comparison:
    """Medians of the stage without its start-up, of the start-up, and of the bare tokenizer.

    `batch` is the number of texts per call of encode_batch.
    """

    template: str
    stage: Usage
    start_up: Usage
    bare: Usage
    batch: int
    tokens: int


def main() -> None:
    options = parse()
    compared = [compare(options, template) for template in TEMPLATES]
    grown = {count: grow(options, count) for count in sorted(options.pairs)}
    report = as_markdown(options, compared, grown)
    print(report)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(report, encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line. Raises a Fault if the tokenizer does not exist."""
    parser = command_line("benchmarks.preprocess", __doc__)
    parser.add_argument("--tokenizer", type=Path, default=BASE, help="folder of the tokenizer")
    parser.add_argument(
        "--compared", type=int, default=50_000, help="number of pairs in the comparison"
    )
    parser.add_argument("--repeats", type=int, default=5, help="repetitions of the comparison")
    parser.add_argument("--pairs", type=int, nargs="+", default=[10_000, 100_000, 1_000_000],
                        help="numbers of pairs at which growth is measured")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated pairs")
    options = parser.parse_args()
    if not (options.tokenizer / "tokenizer.json").is_file():
        raise Fault(
            f"{options.tokenizer}/tokenizer.json does not exist, expected the folder of a tokenizer"
        )
    return options


# --- measuring -------------------------------------------------------------------------------


def compare(options: argparse.Namespace, template: str) -> Comparison:
    """Measure the stage, its start-up and the bare tokenizer in turn, over the same pairs."""
    stage, start_up, bare = [], [], []
    with workspace(options, options.compared, LONG, template) as folder:
        tried = {batch: encoded(folder, template, batch) for batch in BATCHES}
        batch = min(tried, key=lambda batch: tried[batch].processor)
        for _ in range(options.repeats):
            bare.append(encoded(folder, template, batch))
            stage.append(spent(folder, *STAGE)[0])
            start_up.append(spent(folder, *START_UP)[0])
        tokens = read_json(folder / "reports" / "preprocess" / "figures.json")["tokens"]
    whole, before = medians(stage), medians(start_up)
    spent_on = replace(whole - before, memory=whole.memory)
    return Comparison(template, spent_on, before, medians(bare), batch, tokens)


def grow(options: argparse.Namespace, count: int) -> Usage:
    """Measure the stage once, over `count` pairs of short texts."""
    with workspace(options, count, SHORT, TEMPLATES[0]) as folder:
        return spent(folder, *STAGE)[0]


def spent(folder: Path, *arguments: str) -> tuple[Usage, str]:
    """The cost of a Python process in `folder`, and what it prints.

    A process inherits the peak memory of the one that starts it (getrusage(2), execve(2)), so this
    process must stay small.
    """
    begin = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise Fault(f"python {' '.join(arguments)} ended with status {process.returncode}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Usage(seconds, usage.ru_utime + usage.ru_stime, peak), printed


def encoded(folder: Path, template: str, batch: int) -> Usage:
    """The cost of encode_batch in a fresh process, without the time to load."""
    call = f"from benchmarks.preprocess import encode; encode({template!r}, {batch})"
    usage, printed = spent(folder, "-c", call)
    seconds, processor = json.loads(printed)
    return Usage(seconds, processor, usage.memory)


def encode(template: str, batch: int) -> None:
    """Print the seconds that encode_batch takes for the texts of the current folder's pairs."""
    encoder = Encoder(BASE, Template.of(template, False, 2040, BASE, CHAT))
    pairs = (check(record) for _, record in read(PAIRS))
    texts = [encoder.render(p.prompt, side) for p in pairs for side in p.answers]
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    begin, processor = time.perf_counter(), time.process_time()
    for start in range(0, len(texts), batch):
        tokenizer.encode_batch(texts[start : start + batch])
    print(json.dumps([time.perf_counter() - begin, time.process_time() - processor]))


def medians(usages: list[Usage]) -> Usage:
    """The median of each figure."""
    return Usage(
        median(usage.seconds for usage in usages),
        median(usage.processor for usage in usages),
        median(usage.memory for usage in usages),
    )


# --- pairs -----------------------------------------------------------------------------------


@contextmanager
def workspace(
    options: argparse.Namespace, count: int, most: Sentences, template: str
) -> Iterator[Path]:
    """A folder with parameters, tokenizer and generated pairs for preprocess."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        params = (ROOT / "params.yaml").read_text(encoding="utf-8")
        for key, value in (("data", PAIRS), ("template", template), ("chat_template", CHAT)):
            params = re.sub(rf"(?m)^(  {key}: ).*", rf"\g<1>{value}", params)
        (folder / "params.yaml").write_text(params, encoding="utf-8")
        (folder / CHAT).write_text(CHAT_TEMPLATE, encoding="utf-8")
        (folder / "data" / "sets").mkdir(parents=True)
        (folder / BASE).mkdir(parents=True)
        for part in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(options.tokenizer / part, folder / BASE)
        with (folder / PAIRS).open("w", encoding="utf-8") as file:
            for record in records(count, most, random.Random(options.seed)):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        yield folder


def records(count: int, most: Sentences, draw: random.Random) -> Iterator[dict[str, str]]:
    """Distinct pairs with sentences from data/corpus, two per prompt, English or Chinese in turn.

    Prompts differ in their numbers, and the four answers to a prompt in their first sentences.
    """
    languages = [(" ", sentences("en")), ("", sentences("zh"))]
    for number in range((count + 1) // 2):
        space, known = languages[number % 2]
        prompt = space.join(draw.choices(known, k=draw.randint(1, most.prompt)))
        answers = [
            space.join([first, *draw.choices(known, k=draw.randint(1, most.answer) - 1)])
            for first in draw.sample(known, 4)
        ]
        for chosen, rejected in (answers[:2], answers[2:])[: count - 2 * number]:
            yield {"prompt": f"{number}: {prompt}", "chosen": chosen, "rejected": rejected}


def sentences(language: str) -> list[str]:
    text = (ROOT / "data" / "corpus" / f"{language}.txt").read_text(encoding="utf-8")
    return [sentence for sentence in re.split(r"(?<=[.!?。！？])\s*", text) if sentence]


# --- results ---------------------------------------------------------------------------------


def as_markdown(
    options: argparse.Namespace, compared: list[Comparison], grown: dict[int, Usage]
) -> str:
    """All tables and the conditions under which they were measured."""
    growth = [
        [f"{count:,}", *figures(usage), f"{1e6 * usage.seconds / count:.0f}", *step]
        for (count, usage), step in zip(grown.items(), steps(grown), strict=True)
    ]
    versions = ", ".join(f"{name} {version(name)}" for name in ("tokenizers", "pyarrow", "numpy"))
    paragraphs = [
        "# Speed and memory of preprocess",
        "Written by `python -m benchmarks.preprocess`, which says what is measured and how.",
        f"{os.cpu_count()} processors, {versions}",
        *(paragraph for each in compared for paragraph in comparison(options, each)),
        f"Medians of {options.repeats} repetitions over {options.compared:,} pairs. encode_batch "
        "has all rendered texts in memory, in batches of the size with the least processor time.",
        "## Growth, with short texts",
        table(
            [
                *("pairs", "seconds", "processor seconds", "peak memory, MB", "µs per pair"),
                *("µs per extra pair", "bytes per extra pair"),
            ],
            growth,
        ),
        "Start-up is included. Extra pairs are the difference from the row above. Whatever the "
        "number of pairs, the allocator's pools grow during the first ten batches of about half a "
        "million characters, which shows in rows with less text.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def comparison(options: argparse.Namespace, compared: Comparison) -> list[str]:
    """The heading and the table of one template."""
    stage, bare, start_up = compared.stage, compared.bare, compared.start_up
    share, of_processor = bare.seconds / stage.seconds, bare.processor / stage.processor
    speeds = [
        [name, *figures(usage), rate]
        for name, usage, rate in (
            (f"encode_batch of {compared.batch:,} texts", bare, per_second(options, bare)),
            ("preprocess", stage, per_second(options, stage)),
            ("start-up of preprocess, not counted above", start_up, NONE),
        )
    ]
    tokens = compared.tokens / options.compared / 2
    return [
        f"## Template {compared.template}, {tokens:.0f} tokens per text: {share:.0%} of the "
        f"tokenizer's speed in wall-clock time, {of_processor:.0%} in processor time",
        table(["", "seconds", "processor seconds", "peak memory, MB", "pairs/s"], speeds),
    ]


def figures(usage: Usage) -> list[str]:
    return [f"{usage.seconds:.2f}", f"{usage.processor:.2f}", f"{usage.memory / 1e6:.0f}"]


def per_second(options: argparse.Namespace, usage: Usage) -> str:
    return f"{options.compared / usage.seconds:.0f}"


def steps(grown: dict[int, Usage]) -> Iterator[list[str]]:
    """Microseconds and bytes per extra pair, from each size to the next."""
    yield [NONE, NONE]
    for (fewer, before), (more, after) in pairwise(grown.items()):
        extra, pairs = after - before, more - fewer
        yield [f"{1e6 * extra.seconds / pairs:.0f}", f"{extra.memory / pairs:.0f}"]


if __name__ == "__main__":
    run(main)
