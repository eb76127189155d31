"""How busy several training processes are, simulated from the packs of each step.

    python -m benchmarks.scaling

Steps are divided into packs as in training: steps of pairs, and of prompts with four ranked
answers, with the text lengths of a human-preference dataset. The time of a pack is proportional to
its tokens. As in training, all processes wait for the longest pack of each round. Network time is
left out. The busy share is the time of all packs divided by the time of all processes. For
comparison, packs are filled in the order of the pairs, as for one process, and each goes to the
next free process. Prints the table and writes it to benchmarks/results/scaling.md. Takes seconds
and needs no GPU.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.markdown import table
from benchmarks.speed.workload import LONGEST, generated
from reward.model.packing import Texts, balanced, into_packs, tokens
from reward.process import command_line

RESULT = Path(__file__).parent / "results" / "scaling.md"
PROCESSES = (2, 4, 8, 64)
PAIRS_PER_STEP = (16, 32, 64, 128, 256, 512)
TOKENS_PER_PACK = 4096
PROMPTS, IDS = 4096, range(1000)


def main() -> None:
    command_line("benchmarks.scaling", __doc__).parse_args()
    kinds = [
        ("pairs", generated(PROMPTS, 2, 0, IDS, LONGEST), 1),
        ("rankings of 4", generated(PROMPTS, 4, 0, IDS, LONGEST), 6),
    ]
    rows = [
        row(name, prompts, pairs_per_step, pairs_per_step // pairs_per_prompt)
        for name, prompts, pairs_per_prompt in kinds
        for pairs_per_step in PAIRS_PER_STEP
    ]
    heads = ["", "pairs per step", "packs per step", *(f"{count} processes" for count in PROCESSES)]
    paragraphs = [
        "# Several processes",
        "Written by `python -m benchmarks.scaling`, which says what is simulated and how.",
        f"Packs of at most {TOKENS_PER_PACK} tokens. Each cell has the share of time in which the "
        "processes are busy, in brackets the same for packs filled in order, and then what each "
        "process sends per step, in multiples of the size of the adapter's gradient.",
        table(heads, rows),
    ]
    report = "\n\n".join(paragraphs) + "\n"
    print(report)
    RESULT.write_text(report, encoding="utf-8")


def row(
    name: str, prompts: Sequence[Texts], pairs_per_step: int, prompts_per_step: int
) -> list[str]:
    """The row of one workload: means over all of its steps."""
    lengths = [tokens(each) for each in prompts]
    steps = [
        lengths[start : start + prompts_per_step]
        for start in range(0, len(lengths) - prompts_per_step + 1, prompts_per_step)
    ]
    packs = [sizes(step, balanced(step, TOKENS_PER_PACK)) for step in steps]
    filled = [sizes(step, into_packs(step, TOKENS_PER_PACK)) for step in steps]
    cells = []
    for count in PROCESSES:
        ours = busy(packs, count, [in_rounds(each, count) for each in packs])
        other = busy(filled, count, [to_first_free(each, count) for each in filled])
        # Per round, all slices except its own; then its slice of the sum to every other process.
        sent = np.mean([(-(-len(each) // count) + 1) * (1 - 1 / count) for each in packs])
        cells.append(f"{ours:.2f} ({other:.2f}), {sent:.1f}")
    return [name, str(pairs_per_step), f"{np.mean([*map(len, packs)]):.1f}", *cells]


def sizes(lengths: Sequence[int], packs: Sequence[Sequence[int]]) -> list[int]:
    return [sum(lengths[index] for index in indices) for indices in packs]


def in_rounds(packs: Sequence[int], count: int) -> int:
    """The time of a step whose processes wait for each other after every pack."""
    return sum(max(packs[start : start + count]) for start in range(0, len(packs), count))


def to_first_free(packs: Sequence[int], count: int) -> int:
    """The time of a step whose packs each go to the process that is free first."""
    ends = [0] * count
    for size in packs:
        ends[ends.index(min(ends))] += size
    return max(ends)


def busy(packs: Sequence[Sequence[int]], count: int, times: Sequence[int]) -> float:
    return sum(map(sum, packs)) / (count * sum(times))


if __name__ == "__main__":
    main()
