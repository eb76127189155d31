"""How fast reward.serving.score is compared with the bare matrix products of its passes.

    python -m benchmarks.score

A random base of the size in benchmarks.speed goes through the pipeline with one training step. The
exported model then scores generated pairs from file to file. The time includes reading, tokenizing
and writing, but not start-up. Scoring alternates with the matrix products of the base's linear
layers, each in a fresh process, and results are medians. Prints a table and writes it to
benchmarks/results/score.md.
"""

import argparse
import json
import os
import random
import shutil
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from ruamel.yaml import YAML

from benchmarks import random_base
from benchmarks.markdown import table
from benchmarks.preprocess import LONG, ROOT, records
from benchmarks.speed.floor import floor_of_scoring
from benchmarks.speed.hardware import HARDWARE, QUANTIZATION
from benchmarks.speed.measuring import Contender, Measurement, Row, Stopwatch, alone, measure
from benchmarks.speed.workload import PROMPTS_PER_STEP, SHAPE, Workload, linear_shapes
from reward.data.reading import read
from reward.data.records import candidates
from reward.model.base import load_base
from reward.model.packing import Texts, texts_of, tokens
from reward.process import command_line, run
from reward.serving.score import journal_beside, publish, score_files
from reward.serving.scorer import EXPORT, TOKENS_PER_PACK, Scorer
from stages import evaluate, export, fetch, preprocess, train

RESULT = ROOT / "benchmarks" / "results" / "score.md"
TRAINED, SCORED, OUTPUT = Path("trained.jsonl"), Path("scored.jsonl"), Path("rewards.jsonl")
TRAINING_PAIRS = 40
FLOOR = "floor"


def main() -> None:
    options = parse()
    # Set before the first process starts; bitsandbytes and PyTorch each have their own OpenMP.
    os.environ.update(OMP_NUM_THREADS=str(options.threads), MKL_NUM_THREADS=str(options.threads))
    with TemporaryDirectory() as name:
        folder = Path(name)
        print("preparing an export", file=sys.stderr)
        workload = alone(partial(prepare, folder, options.pairs))
        contenders = {
            "score": Contender("reward.serving.score, file to file", partial(score, folder), FLOOR),
            FLOOR: Contender("bare matrix products", floor_of_scoring, FLOOR),
        }
        rows = measure(workload, contenders, options.repeats)
    report = as_markdown(options, sum(map(tokens, workload.prompts)), rows)
    print(report)
    RESULT.write_text(report, encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = command_line("benchmarks.score", __doc__)
    parser.add_argument("--pairs", type=int, default=1000, help="number of scored pairs")
    parser.add_argument("--repeats", type=int, default=5, help="number of measurements of each")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="number of threads"
    )
    return parser.parse_args()


def prepare(folder: Path, count: int) -> Workload:
    """Run the pipeline in a folder; returns what the matrix products need to know."""
    for name in ("corpus", "sets"):
        shutil.copytree(ROOT / "data" / name, folder / "data" / name)
    os.chdir(folder)
    random_base.make(Path("random"), SHAPE)
    draw = random.Random(0)
    for path, number in ((TRAINED, TRAINING_PAIRS), (SCORED, count)):
        lines = [json.dumps(record, ensure_ascii=False) for record in records(number, LONG, draw)]
        path.write_text("\n".join(lines), encoding="utf-8")
    write_params()
    for stage in (fetch, preprocess, train, evaluate, export):
        stage.main()
    return workload_of()


def write_params() -> None:
    yaml = YAML()
    content = yaml.load(ROOT / "params.yaml")
    content["base"]["name"] = "random"
    content["preprocess"]["data"] = str(TRAINED)
    content["train"] |= {"max_steps": 1, "logging_steps": 1, "eval_steps": 1, "save_steps": 1}
    yaml.dump(content, Path("params.yaml"))


def workload_of() -> Workload:
    scorer, texts = Scorer(EXPORT), list[Texts]()
    for _, record in read(SCORED):
        texts.append(texts_of(scorer.encode(scorer.render(candidates(record)))))
    linear, nowhere = linear_shapes(load_base(fetch.BASE, QUANTIZATION)), Path()
    return Workload(nowhere, nowhere, nowhere, texts, linear, TOKENS_PER_PACK, PROMPTS_PER_STEP)


def score(folder: Path, workload: Workload) -> Measurement:
    """Everything that reward.serving.score does after loading the model."""
    os.chdir(folder)
    scorer, stopwatch = Scorer(EXPORT), Stopwatch()
    first = workload.prompts[0]
    scorer.rewards([list(ids) for ids in first.ids], [0] * len(first.ids))
    stopwatch.prepare()
    stopwatch.start()
    with journal_beside(OUTPUT, EXPORT) as journal:
        totals = score_files(scorer, [SCORED], journal)
        publish(journal, OUTPUT)
    stopwatch.stop()
    assert totals.scored == 2 * totals.prompts == 2 * len(workload.prompts)
    return stopwatch.measurement(totals.prompts)


def as_markdown(options: argparse.Namespace, count: int, rows: dict[str, Row]) -> str:
    """The table and the conditions of the measurement; `count` is the number of tokens."""
    shape = ", ".join(f"{name} {value}" for name, value in SHAPE.items())
    lines = []
    for row in rows.values():
        speeds = [each.speed for each in row.measurements]
        share = row.speed / rows[FLOOR].speed
        spread = f"{min(speeds):.2f} to {max(speeds):.2f}"
        lines.append([row.label, f"{row.speed:.2f}", spread, f"{share:.0%}"])
    paragraphs = [
        "# Speed of scoring",
        "Written by `python -m benchmarks.score`, which says what is measured and how.",
        f"{HARDWARE.describe()}, threads: {options.threads}; a random Qwen2 ({shape}), NF4; "
        f"{options.pairs} pairs of {count / options.pairs:.0f} tokens, at most {TOKENS_PER_PACK} "
        f"in a pack; medians of {options.repeats} repetitions",
        table(["", "pairs/s", "range", "share of the products"], lines),
        "PyTorch multiplies with MKL, this project with oneDNN, which is tuned for more "
        "processors, so a share can exceed 100%.",
    ]
    return "\n\n".join(paragraphs) + "\n"


if __name__ == "__main__":
    run(main)
