"""Compare how fast this project and others train a reward model.

    python -m benchmarks.speed

This project is compared with TRL's RewardTrainer, with the article's loop (one pair at a time, two
passes), and with the bare matrix products of the base's linear layers. All have the same base,
pairs, order of pairs, initial adapter and head, optimizer and threads. They alternate, each in a
fresh process, and results are medians. Prints a table and writes it to
benchmarks/results/<cpu or cuda>.md, with the raw figures (.json) and a chart (.svg). The file name
also has the base, the number of answers and the prompts per step, unless they are the defaults.
Needs the extra `bench`.
"""

import argparse
import os
import sys
from functools import partial
from importlib.util import find_spec
from math import comb
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.speed.contenders import contenders
from benchmarks.speed.hardware import HARDWARE
from benchmarks.speed.measuring import alone, measure
from benchmarks.speed.report import as_markdown, describe, write
from benchmarks.speed.workload import PROMPTS_PER_STEP, prepare
from reward.data.tokens import TEMPLATES
from reward.process import Fault, command_line, run


def main() -> None:
    options = parse()
    # Set before the first process starts; bitsandbytes and PyTorch each have their own OpenMP.
    os.environ.update(OMP_NUM_THREADS=str(options.threads), MKL_NUM_THREADS=str(options.threads))
    os.environ["HF_HUB_OFFLINE"] = "1"
    chosen = {
        name: contender
        for name, contender in contenders(
            HARDWARE, options.answers, options.prompts_per_step
        ).items()
        if name in (options.only or [name])
    }
    with TemporaryDirectory() as scratch:
        print("preparing base, pairs and adapter", file=sys.stderr)
        workload = alone(partial(prepare, options, Path(scratch)))
        settings = describe(workload, options)
        rows = measure(workload, chosen, options.repeats)
    report = as_markdown(settings, rows)
    print(report)
    write(settings, rows, report)


def parse() -> argparse.Namespace:
    """The command line. Raises a Fault if it asks for something that cannot be measured."""
    parser = command_line("benchmarks.speed", __doc__)
    names = list(contenders(HARDWARE, answers=3, prompts_per_step=PROMPTS_PER_STEP))
    parser.add_argument(
        "--repeats", type=int, default=3, help="number of measurements of each contender"
    )
    parser.add_argument(
        "--prompts",
        type=int,
        default=256,
        help="number of prompts, a multiple of the prompts per step",
    )
    parser.add_argument(
        "--answers", type=int, default=2, help="number of answers per generated prompt"
    )
    parser.add_argument(
        "--prompts-per-step",
        type=int,
        default=PROMPTS_PER_STEP,
        help="number of prompts per optimizer step",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed for generating or drawing pairs")
    parser.add_argument("--data", type=Path, help="preference pairs, by default generated ones")
    parser.add_argument(
        "--template", default="zh", choices=[*TEMPLATES, "chat"], help="template for --data"
    )
    parser.add_argument(
        "--base", type=Path, help="folder of a base model, by default a small random one"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help=f"contenders to measure, by default all: {', '.join(names)}",
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="number of threads"
    )
    parser.add_argument("--tokens-per-pack", type=int, default=4096, help="maximum size of a pack")
    options = parser.parse_args()
    require_measurable(options, names)
    return options


def require_measurable(options: argparse.Namespace, names: list[str]) -> None:
    """Raises a Fault if the command line asks for something that cannot be measured."""
    for name, lowest in (
        ("repeats", 1),
        ("threads", 1),
        ("tokens_per_pack", 1),
        ("seed", 0),
        ("prompts_per_step", 1),
    ):
        if (value := getattr(options, name)) < lowest:
            raise Fault(f"--{name.replace('_', '-')} is {value}, expected at least {lowest}")
    if options.answers < 2 or (options.data and options.answers > 2):
        raise Fault(
            f"--answers is {options.answers}, expected at least 2, and exactly 2 with --data"
        )
    if unknown := sorted(set(options.only or names) - set(names)):
        raise Fault(f"--only names {', '.join(unknown)}, expected some of {', '.join(names)}")
    step = options.prompts_per_step
    trl = [name for name in options.only or names if name.startswith("trl")]
    batch = max((int(name.split("-")[1]) for name in trl), default=0)
    least = max(2 * step, 2 * batch // comb(options.answers, 2))
    if options.prompts < least or options.prompts % step:
        raise Fault(
            f"--prompts is {options.prompts}, expected a multiple of {step} and at least "
            f"{least}, because the first step of each contender is not counted"
        )
    if options.base and not (options.base / "config.json").is_file():
        raise Fault(
            f"{options.base}/config.json does not exist, expected the folder of a base model"
        )
    if trl and not find_spec("trl"):
        raise Fault(
            "trl is not installed; run pip install -e '.[bench]', or leave TRL out with --only"
        )


if __name__ == "__main__":
    run(main)
