"""Evaluate any reward model on this pipeline's test pairs and extra test sets.

    python -m reward.serving.judge models/skywork data/tokenized
    python -m reward.judging.compare reports/judged/skywork workspace

FOLDER holds a sequence classifier with one label, and SETS is the output of preprocess.
transformers loads the model without running any code from the folder. The model's own chat template
renders the texts, which are scored one at a time. Writes rewards and figures in the format of
evaluate, and never over those of another model.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

from reward.data import tokenized
from reward.data.columns import ANSWER, ANSWERS, PREFIX, PROMPT, PROMPT_ID, RESPONSE, TOKENS
from reward.data.prefixes import prefix_length
from reward.data.records import TOOLS
from reward.data.templates import dated
from reward.judging.evaluation import (
    as_judged,
    as_table,
    load_sets,
    measure,
    measure_sets,
    report,
    write_rewards,
)
from reward.model.base import device, fast_dtype, keep_weights_unpacked, require_no_kernel
from reward.model.head import is_classifier, problem_with_head, problem_with_labels
from reward.model.suitable import problem_with_weights, unused_weights
from reward.outputs import digest, read_json, recorded, whole_folder, with_bar, write_json
from reward.process import Fault, command_line, counted, named, one_line, run, threads

BASE = Path("models/base")
TOKENIZED = Path("data/tokenized")
REPORTS = Path("reports/judged")
FIGURES = "figures.json"
# The key in FIGURES by which the judged model is recognized, and the files that make it up.
MODEL = "model"
AFFECTING = (".jinja", ".json", ".model", ".safetensors", ".tiktoken", ".txt")
# The default of evaluate.seed.
SEED = 0
# What chat templates print as today's date.
DATE = "2026-01-01"
EXPECTED = "expected the folder of a sequence classifier, such as Qwen2ForSequenceClassification"


# A prompt and the number of one of its answers.
Key = tuple[str, int]
# [tokens]
Ids = npt.NDArray[np.int32]


class Scored(NamedTuple):
    """The ids of a text as the model reads it, and the text's reward."""

    ids: Ids
    reward: float


class Judge:
    """A reward model with its tokenizer and chat template."""

    def __init__(self, folder: Path) -> None:
        """Raises a Fault unless transformers can load the classifier of the folder."""
        logging.set_verbosity_error()
        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        try:
            self.model, loading = AutoModelForSequenceClassification.from_pretrained(
                folder,
                dtype=fast_dtype(),
                device_map={"": device()},
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise Fault(
                f"{folder} does not fit in memory ({one_line(error, 200)}), expected a smaller "
                "model or a machine with more memory"
            ) from None
        except Exception as error:  # because files of others may raise anything in the libraries
            raise Fault(f"{folder} cannot be loaded ({named(error)}), {EXPECTED}") from None
        if problem := problem_with_head(loading) or problem_with_weights(self.model, loading):
            raise Fault(f"{folder} {problem}")
        if unused := unused_weights(loading):
            raise Fault(
                f"{folder} has {counted(len(unused), 'tensor')} that a {type(self.model).__name__} "
                f"with its config.json does not have, such as {unused[0]}, expected no others"
            )
        keep_weights_unpacked(self.model.eval())
        self.size = self.model.get_input_embeddings().num_embeddings
        self.folder, self.template = folder, chat_template(folder, self.tokenizer)

    def encode(self, answers: Dataset) -> dict[Key, Ids]:
        """The ids of every answer of a split, by prompt and answer number.

        Raises a Fault if the chat template cannot render one, or the model cannot read it.
        """
        found = {}
        for row in answers:
            key = row[PROMPT_ID], row[ANSWER]
            ids = self.ids(key, json.loads(row[PROMPT]) + json.loads(row[RESPONSE]))
            found[key] = np.array(ids, dtype=np.int32)
        return found

    def judge(self, encoded: Mapping[Key, Ids]) -> dict[Key, Scored]:
        """The reward of every answer. Raises a Fault if one is not finite."""
        found = {
            key: Scored(encoded[key], self.reward(encoded[key]))
            for key in with_bar(encoded, f"judging with {self.folder}", "answers")
        }
        if broken := sum(not np.isfinite(each.reward) for each in found.values()):
            raise Fault(
                f"{self.folder}: the rewards of {broken} of {len(found)} answers are not finite, "
                f"expected a model that can compute in {fast_dtype()}"
            )
        return found

    def ids(self, key: Key, messages: list[dict[str, Any]]) -> list[int]:
        """The ids of a conversation, rendered with the model's own chat template."""
        tools = [tool for each in messages for tool in each.get(TOOLS, [])]
        try:
            found = self.tokenizer.apply_chat_template(
                [each for each in messages if each["role"] != TOOLS],
                tools=tools or None,
                chat_template=self.template,
                return_dict=False,
            )
        except Exception as error:  # because a template is a program and may raise anything
            raise Fault(
                f"{self.folder}: its chat template rejects answer {key[1]} of prompt {key[0]} "
                f"({one_line(error, 200)}), expected one that renders the test sets"
            ) from None
        if not found:
            raise Fault(
                f"{self.folder}: its chat template renders nothing for answer {key[1]} of prompt "
                f"{key[0]}, expected one that renders the test sets"
            )
        if max(found) >= self.size:
            raise Fault(
                f"{self.folder}: its tokenizer has the id {max(found)}, for which the model has no "
                f"embedding, expected a tokenizer of at most {self.size} ids"
            )
        most = getattr(self.model.config, "max_position_embeddings", None)
        if most and len(found) > most:
            raise Fault(
                f"{self.folder} reads at most {most} tokens, but answer {key[1]} of prompt "
                f"{key[0]} has {len(found)}; lower preprocess.max_length"
            )
        return list(found)

    @torch.no_grad()
    def reward(self, ids: Ids) -> float:
        """The reward of a text in its own batch, so that padding cannot affect it."""
        row = torch.tensor(ids[None], dtype=torch.long, device=device())
        return float(self.model(input_ids=row).logits[0, 0])


def main() -> None:
    options = parse()
    output = options.output or REPORTS / options.model.resolve().name
    require_classifier(options.model)
    model = files_of(options.model)
    require_output(output, model)
    torch.set_num_threads(threads())
    pairs = {options.sets / "test": tokenized.load(options.sets / "test", BASE)}
    # Leaked prompts are only known for the pipeline's own model.
    sets = [
        replace(each, notes=each.notes | {"leaked": 0})
        for each in load_sets(options.sets / "sets", BASE)
    ]
    pairs |= {options.sets / "sets" / each.name: each.pairs for each in sets}
    judge = Judge(options.model)
    # All of them before the first reward, because scoring takes hours with a large model.
    encoded = [judge.encode(tokenized.load_answers(path, BASE)) for path in pairs]
    table, *tables = [
        table_of(each, judge.judge(ids)) for each, ids in zip(pairs.values(), encoded, strict=True)
    ]
    figures = measure(table, as_judged(table), SEED)
    figures["sets"] = measure_sets(sets, tables)
    figures[MODEL] = model
    with whole_folder(output) as folder:
        write_rewards(folder, table, sets, tables)
        write_json(folder / FIGURES, figures)
    report(figures, options.sets / "test")
    print(f"written    {output}; python -m reward.judging.compare {output} workspace")


def parse() -> argparse.Namespace:
    parser = command_line("reward.serving.judge", __doc__)
    parser.add_argument("model", type=Path, metavar="FOLDER", help="folder of a reward model")
    parser.add_argument(
        "sets",
        type=Path,
        metavar="SETS",
        nargs="?",
        default=TOKENIZED,
        help=f"output folder of preprocess, with the test sets ({TOKENIZED})",
    )
    parser.add_argument(
        "--output", type=Path, help=f"folder for rewards and figures ({REPORTS}/NAME)"
    )
    return parser.parse_args()


def files_of(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a model that affect its rewards, by which it is recognized."""
    files = sorted(path for path in folder.iterdir() if path.suffix in AFFECTING and path.is_file())
    return {path.name: digest(path) for path in with_bar(files, f"digests of {folder}")}


def require_output(output: Path, model: dict[str, str]) -> None:
    """Raises a Fault for an existing folder, unless it is this module's result for the model."""
    if not output.exists():
        return
    if not (output / FIGURES).is_file():
        raise Fault(f"--output is {output}, which has other files, expected a new folder")
    if recorded(output / FIGURES).get(MODEL) != model:
        raise Fault(
            f"{output} has the rewards of another or an unknown model; remove it, or choose "
            "another folder with --output"
        )


def require_classifier(folder: Path) -> None:
    """Raises a Fault unless a folder's configuration is that of a classifier with one label."""
    if (folder / "adapter_config.json").exists():
        raise Fault(
            f"{folder} is an adapter, which is not judged, {EXPECTED}, or a merged model, such as "
            "models/export/merged"
        )
    path = folder / "config.json"
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise Fault(f"{path} cannot be read ({one_line(error)}), {EXPECTED}") from None
    if not isinstance(config, dict):
        raise Fault(f"{path} is not a JSON object, {EXPECTED}")
    require_no_kernel(folder, config)
    if not is_classifier(config):
        raise Fault(f"{folder} is a {', '.join(config.get('architectures') or ['?'])}, {EXPECTED}")
    if reason := problem_with_labels(config):
        raise Fault(f"{folder} {reason}")


def chat_template(folder: Path, tokenizer: Any) -> str:
    """The chat template of a tokenizer; the default one if there are several."""
    found = tokenizer.chat_template
    if isinstance(found, dict):
        found = found.get("default")
    if not found:
        raise Fault(f"{folder} has no chat template, expected one that renders the answers")
    return dated(found, DATE)


def table_of(pairs: Dataset, answers: Mapping[Key, Scored]) -> pa.Table:
    """The rewards of comparisons in evaluate's format; lengths count the model's own tokens."""
    j, k = (
        [answers[key] for key in zip(pairs[PROMPT_ID][:], pairs[name][:], strict=True)]
        for name in ANSWERS
    )
    sides = (np.array([each.reward for each in side], dtype=np.float32) for side in (j, k))
    table = as_table(pairs, *sides)
    own = {
        name: [len(each.ids) for each in side] for name, side in zip(TOKENS, (j, k), strict=True)
    }
    own[PREFIX] = [prefix_length(one.ids, other.ids) for one, other in zip(j, k, strict=True)]
    for name, values in own.items():
        place = table.column_names.index(name)
        table = table.set_column(place, name, pa.array(values, table[name].type))
    return table


if __name__ == "__main__":
    run(main)
