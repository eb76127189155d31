"""The model card of an exported folder: what the model is, how good it is and how to load it.

Its template is card.md in the same folder.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined

LATEX = {mark: f"\\{mark}" for mark in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
TEMPLATE = Path(__file__).with_suffix(".md")
# The keys of the record of train that the card shows.
SHOWN = {"base_parameters", "data", "lora", "pairs", "quantization", "train"}


@dataclass(frozen=True)
class Facts:
    """What a card says about an export, and whether it is a `mixture` of experts.

    `base` and `training` are the records of fetch and train, `recipe` is the quantization of the
    base, `reward` is what clients need to know about the rewards and `metrics` is what evaluate
    measured. `pad` is the pad token. `adapter` is the SHA-256 of the adapter's weights, and
    `licenses` are those of the data, and None if some of it has none. `left_out` are the clients
    that could not be compared because they did not fit in memory.
    """

    base: dict[str, Any]
    training: dict[str, Any]
    recipe: dict[str, Any] | None
    reward: dict[str, Any]
    pad: str
    metrics: dict[str, Any]
    has_base: bool
    has_merged: bool
    mixture: bool
    adapter: str
    licenses: Sequence[str | None]
    left_out: Sequence[str] = ()


def render(facts: Facts) -> str:
    """The card as text; nothing in it depends on this machine."""
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"cell": cell, "latex": latex, "span": span}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    base, recipe, training = facts.base, facts.recipe, facts.training
    code = ", ".join(f"{key}={value!r}" for key, value in (recipe or {}).items())
    return template.render(
        vars(facts),
        front_matter=front_matter(base).to_yaml(),
        license=", ".join(licence(base).values()),
        name=name_of(base),
        revision=revision(base),
        quantization=recipe["bnb_4bit_quant_type"].upper() if recipe else "not quantized",
        quantization_config=f"BitsAndBytesConfig({code})" if recipe else None,
        template=json.dumps(facts.reward["template"], ensure_ascii=False),
        parameters=json.dumps(
            {name: training[name] for name in ("quantization", "lora", "train")}, indent=2
        ),
    )


def name_of(base: dict[str, Any]) -> str:
    """The name of the base: of a local folder the last part, of a merged export the last two."""
    if base["kind"] != "local":
        return str(base["name"])
    folder = Path(base["name"])
    return Path(*folder.parts[-2 if folder.name == "merged" else -1 :]).as_posix()


def revision(base: dict[str, Any]) -> str:
    """The revision of the base, and what it was converted to, if it was."""
    found = f"commit {base['revision']}" if base["kind"] == "hub" else str(base["revision"])
    return f"{found}, {base['converted']}" if "converted" in base else found


def front_matter(base: dict[str, Any]) -> ModelCardData:
    """The metadata that the Hub reads from a card; the licence is that of the base."""
    return ModelCardData(
        base_model=base["name"] if base["kind"] == "hub" else None,
        **licence(base),
        library_name="peft",
        pipeline_tag="text-classification",
        tags=["reward-model", "lora"],
    )


def licence(base: dict[str, Any]) -> dict[str, Any]:
    """What fetch found about the licence, with the Hub's keys in their usual order."""
    found = base.get("license", {})
    return {
        name: found[name] for name in ("license", "license_name", "license_link") if name in found
    }


def span(text: str) -> str:
    """Text as inline code, between more backticks than any run of them in the text."""
    marks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{marks} {text} {marks}"


def latex(text: str) -> str:
    """Text escaped for LaTeX, in a single line."""
    escaped = "".join(LATEX.get(mark, mark) for mark in text)
    return " ".join(escaped.split())


def cell(text: str) -> str:
    """Text escaped for a cell of a Markdown table, in a single line."""
    escaped = "".join(f"\\{mark}" if mark in "\\`*_{}[]<>()#|!" else mark for mark in text)
    return " ".join(escaped.split())
