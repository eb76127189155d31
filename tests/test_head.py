"""A base that is already a reward model: its head is kept, or the model is refused."""

import shutil
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from bitsandbytes.nn.modules import Params4bit
from datasets import load_from_disk
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, LlamaConfig, Qwen2Config

from reward import params
from reward.data.columns import IDS
from reward.data.tokens import Encoder, Template
from reward.exporting.portable import prepare_tokenizer
from reward.model import checkpoints, trainer
from reward.model.base import Quantization, head_of, weight_bytes
from reward.model.packing import pairs_of
from reward.model.scoring import rewards, score
from reward.outputs import read_json, write_json
from reward.process import Fault
from stages import fetch, preprocess, train
from tests import support
from tests.support import SetParams, built, write_pairs

WEIGHTS = "adapter_model.safetensors"
KINDS = {"qwen2": Qwen2Config, "llama": LlamaConfig}


def save_classifier(folder: Path, tokenizer: Path, kind: str = "qwen2", labels: int = 1) -> Path:
    """Save a small random classifier in its published format, with rewards far from zero."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)
    torch.manual_seed(0)
    config = KINDS[kind](
        vocab_size=read_json(tokenizer / "config.json")["vocab_size"],
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        num_labels=labels,
    )
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        model.score.weight.mul_(10)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def reward_model(
    workspace: Path, tiny_base: Path, set_params: SetParams, request: pytest.FixtureRequest
) -> Path:
    """A classifier fetched as the base, with 14 tokenized training pairs."""
    kind = getattr(request, "param", "qwen2")
    folder = save_classifier(workspace / "classifier", tiny_base, kind)
    set_params("base", name="classifier")
    set_params("quantization", bits="none")
    set_params("train", max_steps=1, warmup_steps=0, logging_steps=1, save_steps=1)
    fetch.main()
    write_pairs(workspace / "data" / "raw" / "pairs.json", 20)
    preprocess.main()
    return folder


def own_rewards(folder: Path, split: str) -> torch.Tensor:
    """The rewards from transformers for each text, one at a time: [pairs, 2]."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    rows = load_from_disk(f"data/tokenized/{split}")
    with torch.no_grad():
        return torch.tensor(
            [[model(torch.tensor([row[name]])).logits.item() for name in IDS] for row in rows]
        )


def head_in(path: Path) -> torch.Tensor:
    [found] = [each for name, each in load_file(path).items() if name.endswith("score.weight")]
    return found


def validation_loss(rewards: torch.Tensor) -> float:
    return float(-torch.nn.functional.logsigmoid(rewards[:, 0] - rewards[:, 1]).mean())


@pytest.mark.parametrize("reward_model", KINDS, indirect=True)
def test_training_starts_with_the_rewards_of_the_base(reward_model: Path) -> None:
    own = own_rewards(reward_model, "train")
    found = score(built(), pairs_of(load_from_disk("data/tokenized/train")), 4096).view(-1, 2)
    assert own.std() > 0.2
    assert (found - own).abs().max() < 1e-4


def test_first_validation_figures_match_the_base(
    reward_model: Path, set_params: SetParams, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = validation_loss(own_rewards(reward_model, "validation"))
    train.main()
    first, *_ = read_json(train.REPORTS / "validation.json")
    assert first["step"] == 0
    assert first["loss"] == pytest.approx(loss, abs=1e-4)
    assert "unquantized" not in capsys.readouterr().out

    set_params("quantization", bits=4)
    train.main()
    unquantized = f"unquantized validation loss {loss:.4f}  accuracy"
    printed = capsys.readouterr().out
    assert "note       the base's head was probably trained with preprocess.template" in printed
    assert any(line.startswith(unquantized) for line in printed.splitlines())
    assert printed.index(unquantized) < printed.index("step     0  validation loss")
    own, adapter = head_in(reward_model / "model.safetensors"), head_in(train.ADAPTER / WEIGHTS)
    assert torch.equal(head_of(built().get_base_model()).weight, own)
    assert 0 < (adapter - own).norm() < 0.1 * own.norm()  # training continues from it


@pytest.mark.parametrize("loads", [False, True], ids=["weights", "scoring"])
@pytest.mark.usefixtures("reward_model")
def test_unquantized_base_that_does_not_fit_is_not_needed(
    set_params: SetParams,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    loads: bool,
) -> None:
    set_params("quantization", bits=4)
    if loads:
        monkeypatch.setattr(
            "reward.model.scoring.rewards",
            lambda model, batch: rewards(model, batch) if is_in_4_bits(model) else run_out(),
        )
    else:
        kinds = Quantization(4, "nf4", True, "float32"), Quantization.unquantized("float32")
        sizes = [weight_bytes(Path("models/base"), kind) for kind in kinds]
        monkeypatch.setattr("reward.model.base.memory", lambda: sum(sizes) / 2)
    train.main()
    printed = capsys.readouterr().out
    assert "note       the unquantized base does not fit in memory, so its figures" in printed
    assert "step     0  validation loss" in printed


def is_in_4_bits(model: torch.nn.Module) -> bool:
    return any(isinstance(each, Params4bit) for each in model.parameters())


def run_out() -> torch.Tensor:
    raise torch.OutOfMemoryError


def test_new_head_replaces_that_of_the_base(reward_model: Path, set_params: SetParams) -> None:
    own = head_in(reward_model / "model.safetensors")
    heads = []
    for head in ("auto", "new"):
        set_params("train", head=head)
        heads.append(head_of(built().get_base_model()).weight)
        assert train.keeps_head(params.load("train", trainer.Train)) == (head == "auto")
    assert torch.equal(heads[0], own)
    assert not torch.equal(heads[1], own)


@pytest.mark.usefixtures("reward_model")
def test_non_finite_rewards_of_the_base_stop_the_stage() -> None:
    model, options = built(), params.load("train", trainer.Train)
    with torch.no_grad():
        for parameter in head_of(model.get_base_model()).parameters():
            parameter.fill_(torch.inf)
    rows = load_from_disk("data/tokenized/train")
    run = checkpoints.Run(Path("models/checkpoints/run"))
    ours = trainer.RewardTrainer(model, options, run, train.steps(options, rows), rows, Path("x"))
    with pytest.raises(Fault, match="rewards of the first pairs are not finite"):
        ours.fit(new_head=False)


@pytest.mark.usefixtures("project")
def test_copy_of_an_export_can_be_trained_again() -> None:
    """As a base, the merged model has the rewards of the evaluation."""
    shutil.copytree("models/export", "models/mine")
    support.set_params("base", name="models/mine/merged")
    support.set_params("quantization", bits="none")
    fetch.main()
    preprocess.main()
    test = load_from_disk("data/tokenized/test")
    found = score(built(), pairs_of(test), 4096).view(-1, 2)
    evaluated = pyarrow.parquet.read_table("reports/evaluate/rewards.parquet")
    assert evaluated["id"].to_pylist() == list(test["id"])
    expected = torch.tensor(
        [evaluated["reward_chosen"].to_pylist(), evaluated["reward_rejected"].to_pylist()]
    ).T
    assert (found - expected).abs().max() < 1e-4


# Chat templates, the second with a date.
OTHER = "{{ messages[0].content }}{{ messages[1].content }}"
DATED = "{{ strftime_now('%Y') }}" + OTHER
ZH, NONE = r'"问:{prompt}\n\n答:{answer}"', '"{prompt}{answer}"'


def template(name: str, append_eos: bool) -> Template:
    """The template that preprocess makes of a name, or of a chat template."""
    path = None
    if name in (OTHER, DATED):
        path = Path("own.jinja")
        path.write_text(name)
    return Template.of("chat" if path else name, append_eos, 99, train.BASE, path, "2026-01-01")


@pytest.mark.parametrize(
    ("before", "now", "was", "has"),
    [
        (("zh", False), ("zh", False), "", ""),
        (("zh", False), ("chat", False), "", ""),
        (("zh", True), ("zh", True), "", ""),
        (("zh", True), ("chat", True), "", ""),
        (("zh", True), ("chat", False), "", ""),  # the exported chat template renders the eos
        ((DATED, True), ("chat", True), "", ""),
        (("zh", False), ("none", False), f"template {ZH}", f"template {NONE}"),
        (("zh", False), ("zh", True), "append_eos false", "append_eos true"),
        (("zh", False), ("chat", True), "append_eos false", "append_eos true"),
        (("zh", False), (OTHER, False), f"template {ZH}", 'template "chat with another'),
        (("chat", False), ("zh", False), 'template "chat"', f"template {ZH}"),
        (("chat", False), (OTHER, False), 'template "chat"', 'template "chat with another'),
    ],
)
@pytest.mark.usefixtures("workspace")
def test_other_texts_than_those_of_the_exported_head_are_noted(
    capsys: pytest.CaptureFixture[str],
    before: tuple[str, bool],
    now: tuple[str, bool],
    was: str,
    has: str,
) -> None:
    """There is a note if, and only if, the ids of a pair are not those of its training."""

    def ids(template: Template) -> list[list[int]]:
        encoder = Encoder(train.BASE, template)
        return encoder.encode([encoder.render((("user", "Hi?"),), (("assistant", "Yes."),))])

    trained = template(*before)
    known = {"template": trained.template, "append_eos": trained.append_eos}
    config = read_json(train.BASE / "config.json")
    write_json(train.BASE / "config.json", config | {"reward_model": known})
    expected = ids(trained)
    prepare_tokenizer(train.BASE, trained, config["vocab_size"]).save(train.BASE)
    used = template(*now)
    used.save(train.TOKENIZED / "template.json")
    train.report_other_texts()
    printed = capsys.readouterr().out
    assert (ids(used) == expected) == (not printed)
    if printed:
        start = f"note       the base's head was trained with preprocess.{was}, but the data has "
        assert printed.startswith(f"{start}preprocess.{has}")
        assert printed.endswith("; its rewards are worse on other texts\n")


@pytest.mark.parametrize(
    ("name", "has_chat", "noted"),
    [("zh", True, True), ("zh", False, False), ("chat", True, False)],
)
@pytest.mark.usefixtures("workspace")
def test_text_template_is_noted_if_another_reward_model_has_a_chat_template(
    capsys: pytest.CaptureFixture[str], name: str, has_chat: bool, noted: bool
) -> None:
    template(name, append_eos=True).save(train.TOKENIZED / "template.json")
    config = read_json(train.BASE / "tokenizer_config.json")
    if not has_chat:
        del config["chat_template"]
    write_json(train.BASE / "tokenizer_config.json", config)
    train.report_other_texts()
    note = (
        'note       the base\'s head was probably trained with preprocess.template "chat", but the '
        f"data has preprocess.template {ZH}; its rewards are worse on other texts\n"
    )
    assert capsys.readouterr().out == (note if noted else "")


# --- refused models --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "labels", "found"),
    [
        (None, 2, "is a classifier with 2 labels, expected one label, which is the reward"),
        (None, 3, "is a classifier with 3 labels, expected one label, which is the reward"),
        (
            {"weight": (1, 64), "bias": (1,)},
            1,
            "has a head with a bias, score.bias, expected only score.weight",
        ),
        ({}, 1, "is a classifier without a head, expected score.weight among its weights"),
        (
            {"weight": (2, 64)},
            1,
            "has a head with 2 labels, expected one label, which is the reward",
        ),
        (
            {"weight": (1, 65)},
            1,
            "has score.weight of shape [1, 65], expected [1, 64], as its config.json says",
        ),
    ],
)
def test_head_without_a_single_reward_is_refused(
    workspace: Path,
    tiny_base: Path,
    set_params: SetParams,
    head: dict[str, tuple[int, ...]] | None,
    labels: int,
    found: str,
) -> None:
    """The shapes of the head's tensors are those of `head`."""
    shutil.rmtree("models/base")
    folder = save_classifier(workspace / "classifier", tiny_base, labels=labels)
    if head is not None:
        tensors = load_file(folder / "model.safetensors")
        del tensors["score.weight"]
        tensors |= {f"score.{name}": torch.ones(shape) for name, shape in head.items()}
        save_file(tensors, folder / "model.safetensors")
    set_params("base", name="classifier")
    with pytest.raises(Fault) as fault:
        fetch.main()
    assert str(fault.value) == f"params.yaml: base.name classifier {found}"
    assert not Path("models/base").exists()


@pytest.mark.parametrize("name", ["models/export", "models/export/merged", "mine"])
def test_base_in_the_exported_folder_is_refused(
    workspace: Path, set_params: SetParams, name: str
) -> None:
    (workspace / "mine").symlink_to("models/export/merged")
    set_params("base", name=name)
    with pytest.raises(Fault, match=r"is in models/export, .*from its base; expected a copy of it"):
        fetch.main()


def test_message_about_the_exported_folder_says_what_the_docs_say(set_params: SetParams) -> None:
    set_params("base", name="models/export")
    with pytest.raises(Fault) as fault:
        fetch.main()
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
    copy, base = str(fault.value).partition("elsewhere: ")[2].split(", and then ")
    assert f"```sh\n{copy}\ndvc exp run -S {base}\n```" in page
