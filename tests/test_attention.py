"""Attention over a pack: what each text sees, and that a pack gives what its texts give alone."""

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from reward.model import attention
from reward.model.attention import Plan, attend, by_flash, text_by_text
from reward.model.base import Quantization, add_lora, head_of, load_base, new_head
from reward.model.packing import Texts, pack
from reward.model.pairwise import chosen_and_rejected, losses
from reward.model.scoring import as_in_transformers, evaluating, require_exact, rewards
from reward.process import Fault
from tests.support import FAMILIES, SEPARATE, SHAPE, VOCABULARY, fetched, prompts_of

Attention = Callable[..., Tensor]

# Families whose last layer is worked on whole.
CALLED_OTHERWISE = {"OPT", "GPT-2"}
PLAIN = Quantization(bits="none", quant_type="nf4", double_quant=False, compute_dtype="float32")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that the tests' texts have several of."""
    monkeypatch.setattr(attention, "BLOCK", 8)


def model_of(folder: Path, family: str, **shape: Any) -> PeftModel:
    """A tiny random model of a family of the table with adapters that are not zero."""
    return adapted(fetched(family, folder, **shape), FAMILIES[family][2])


def reward_model(
    folder: Path, kind: str, targets: list[str], *, of_layers: int | None = None, **shape: Any
) -> PeftModel:
    """The same of a model type, whatever it is."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPE | shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return adapted(folder, targets, of_layers)


def adapted(folder: Path, targets: list[str], of_layers: int | None = None) -> PeftModel:
    base = load_base(folder, PLAIN)
    new_head(base, 0)
    layers = list(range(of_layers)) if of_layers else None
    lora = LoraConfig(r=4, lora_alpha=32, target_modules=targets, layers_to_transform=layers)
    lora.init_lora_weights = False
    return add_lora(base, lora)


def stock_rewards(model: PeftModel, prompts: list[Texts]) -> Tensor:
    """Every text by itself through transformers' own forward pass: no pack, no padding."""
    with as_in_transformers(model) as classifier:
        classifier.config.pad_token_id = None
        return torch.stack(
            [
                classifier(input_ids=torch.tensor([ids]), use_cache=False).logits[0, 0]
                for texts in prompts
                for ids in texts.ids
            ]
        )


def gradients(model: PeftModel, found: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    losses(*chosen_and_rejected(found)).mean().backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def checkpoint_activations(model: PeftModel) -> None:
    classifier = cast(PreTrainedModel, model.get_base_model())
    classifier.activation_checkpointing_enable({"use_reentrant": False})


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


# --- equal to the texts alone ----------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_and_gradients_are_those_of_two_stock_passes(
    tmp_path: Path, family: str, checkpointing: bool
) -> None:
    model, prompts = model_of(tmp_path, family), prompts_of(0)
    wanted = stock_rewards(model, prompts)
    wanted_gradients = gradients(model, wanted)
    if checkpointing:
        checkpoint_activations(model)
    model.train()
    found = rewards(model, pack(prompts))
    found_gradients = gradients(model, found)
    assert relative(found, wanted) < 1e-5
    assert wanted_gradients.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert found_gradients.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        assert gradient.norm() > 0, name
        assert relative(found_gradients[name], gradient) < 5e-5, name


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - CALLED_OTHERWISE))
def test_the_last_layer_works_on_the_last_tokens_alone(tmp_path: Path, family: str) -> None:
    model, prompts = model_of(tmp_path, family), prompts_of(1)
    layers = cast(Any, model.get_base_model()).base_model.layers
    seen: list[int] = []
    for layer in layers:
        layer.mlp.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    rewards(model, pack(prompts))
    whole = pack(prompts).input_ids.shape[1]
    assert seen == [whole, whole, 2 * len(prompts)]


def test_adapters_on_lower_layers_alone_have_the_same_gradients(tmp_path: Path) -> None:
    model = reward_model(tmp_path, "qwen2", SEPARATE, of_layers=1)
    prompts = prompts_of(2)
    wanted = gradients(model, stock_rewards(model, prompts))
    found = gradients(model, rewards(model, pack(prompts)))
    assert len(found) == 7
    for name, gradient in wanted.items():
        assert relative(found[name], gradient) < 1e-5


def test_three_texts_of_a_prompt_are_three_texts(tmp_path: Path) -> None:
    model = reward_model(tmp_path, "llama", SEPARATE)
    draw = random.Random(4)
    prompts = [
        Texts([[5, 6, 7] + [draw.randrange(3, 300) for _ in range(n + k)] for k in range(n)], 3)
        for n in (1, 3, 2, 5)
    ]
    found = rewards(model, pack(prompts))
    assert found.shape == (11,)
    assert relative(found, stock_rewards(model, prompts)) < 1e-5


def test_a_reward_depends_on_nothing_else_in_the_pack(tmp_path: Path) -> None:
    """Alone, in any order, in any company: within 1e-6 of the rewards' size, fp32 rounding."""
    model, prompts = reward_model(tmp_path, "qwen2", SEPARATE), prompts_of(5, 12)
    with torch.no_grad(), evaluating(model):
        wanted = torch.cat([rewards(model, pack([texts])) for texts in prompts]).view(-1, 2)
        for seed, size in ((0, 12), (1, 5), (2, 2)):
            order = random.Random(seed).sample(range(12), 12)
            for start in range(0, 12, size):
                group = order[start : start + size]
                found = rewards(model, pack([prompts[index] for index in group])).view(-1, 2)
                assert relative(found, wanted[group]) < 1e-6


@pytest.mark.parametrize("changed", [0, 1])
def test_tokens_of_one_answer_never_touch_the_other_reward(tmp_path: Path, changed: int) -> None:
    model, prompts = reward_model(tmp_path, "qwen2", SEPARATE), prompts_of(6)
    before = rewards(model, pack(prompts)).view(-1, 2)
    for index, texts in enumerate(prompts):
        for place in range(texts.prefix, len(texts.ids[changed])):
            ids = [list(text) for text in texts.ids]
            ids[changed][place] = (ids[changed][place] + 7) % VOCABULARY
            others = [*prompts[:index], Texts(ids, texts.prefix), *prompts[index + 1 :]]
            after = rewards(model, pack(others)).view(-1, 2)
            same = torch.ones_like(before, dtype=torch.bool)
            same[index, changed] = False
            assert torch.equal(after[same], before[same])
            assert after[index, changed] != before[index, changed]


# --- windows, and what is refused ------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("mistral", {"sliding_window": 7}),
        ("qwen2", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}),
        ("phi3", {"sliding_window": 7}),
        ("gemma3_text", {"sliding_window": 7, "head_dim": 16}),
    ],
)
def test_a_sliding_window_is_honoured(tmp_path: Path, family: str, shape: dict[str, Any]) -> None:
    targets = ["qkv_proj"] if family == "phi3" else SEPARATE
    model, prompts = reward_model(tmp_path, family, targets, **shape), prompts_of(7)
    wanted = stock_rewards(model, prompts)
    assert relative(rewards(model, pack(prompts)), wanted) < 1e-5
    wanted_gradients = gradients(model, wanted)
    for name, gradient in gradients(model, rewards(model, pack(prompts))).items():
        assert relative(gradient, wanted_gradients[name]) < 1e-5
    cast(Any, model.config).sliding_window = None
    for module in model.modules():
        if hasattr(module, "sliding_window"):
            cast(Any, module).sliding_window = None
    assert relative(rewards(model, pack(prompts)), wanted) > 1e-3


@pytest.mark.parametrize(
    ("family", "fault"),
    [
        ("gemma2", "Gemma2Attention has softcap in its attention, wanted plain causal"),
        ("gpt_oss", "GptOssAttention has s_aux in its attention"),
        ("stablelm", "StableLmAttention is not told how its row is laid out"),
        ("falcon", "FalconForSequenceClassification takes no attention but its own"),
        ("bloom", "BloomForSequenceClassification takes no attention but its own"),
        ("cohere", "transformers has no classifier over cohere"),
    ],
)
def test_other_attention_is_refused_by_name(tmp_path: Path, family: str, fault: str) -> None:
    targets = ["query_key_value"] if family in ("falcon", "bloom") else SEPARATE
    shape = {"head_dim": 16} if family in ("gemma2", "gpt_oss") else {}
    with pytest.raises(Fault, match=fault):
        rewards(reward_model(tmp_path, family, targets, **shape), pack(prompts_of(0)))


def test_a_mask_that_a_model_brings_is_refused() -> None:
    x = torch.zeros(1, 1, 3, 4)
    plan = Plan(pack([Texts([[1, 2], [1, 3]], 1)]).layout, x.device)
    with pytest.raises(Fault, match="Identity has a mask of its own in its attention"):
        attend(nn.Identity(), x, x, x, torch.zeros(1, 1, 3, 3), plan=plan)


def test_a_model_that_a_pack_computes_otherwise_is_refused(tmp_path: Path) -> None:
    model = reward_model(tmp_path, "qwen2", SEPARATE)
    texts = prompts_of(8)[1]
    require_exact(model.train(), texts)
    assert model.training
    assert cast(Any, model.config)._attn_implementation == attention.NAME
    layer = cast(Any, model.get_base_model()).base_model.layers[0]

    def mixing(_: Any, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + given[0].mean(1, keepdim=True)

    layer.mlp.register_forward_hook(mixing)
    with pytest.raises(
        Fault, match=r"^Qwen2ForSequenceClassification: a pair of \d+ tokens in one"
    ):
        require_exact(model, texts)


def test_dropout_of_the_base_is_off_and_that_of_adapters_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("phi", **SHAPE, resid_pdrop=0.5, attention_dropout=0.5)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    base = load_base(tmp_path, PLAIN)
    new_head(base, 0)
    lora = LoraConfig(r=4, lora_dropout=0.5, target_modules=SEPARATE, init_lora_weights=False)
    model, batch = add_lora(base, lora), pack(prompts_of(9))
    drops = {
        name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)
    }
    assert {p for name, p in drops.items() if "lora" in name} == {0.5}
    assert {p for name, p in drops.items() if "lora" not in name} == {0.0}
    model.train()
    assert not torch.equal(rewards(model, batch), rewards(model, batch))
    with model.disable_adapter():
        assert torch.equal(rewards(model, batch), rewards(model, batch))


# --- the two ways of computing it ------------------------------------------------------------


def slowly(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, scaling: float, window: int | None
) -> Tensor:
    """One query at a time, one head at a time, by the definition: [1, queries, heads, size]."""
    layout, groups = plan.layout, query.shape[1] // key.shape[1]
    outputs: list[Tensor] = []
    for text, count in enumerate(layout.queries):
        owner, end = layout.owner[text], layout.ends[text] + 1
        start = layout.ends[owner] + 1 - layout.own[owner]
        places = [
            *range(start, start + layout.prefix[text]),
            *range(end - layout.own[text], end),
        ]
        for back in reversed(range(count)):
            seen = places[: len(places) - back][-(window or len(places)) :]
            rows = []
            for head in range(query.shape[1]):
                scores = key[0, head // groups, seen] @ query[0, head, len(outputs)] * scaling
                rows.append(scores.softmax(0) @ value[0, head // groups, seen])
            outputs.append(torch.stack(rows))
    return torch.stack(outputs)[None]


def flash_by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    most_queries: int,
    most_keys: int,
    *,
    scale: float,
    window_size: tuple[int, int],
) -> Tensor:
    """What torch documents of varlen_attn: causal, aligned at the end, keys left of the query."""
    assert cu_queries.dtype == cu_keys.dtype == torch.int32
    assert window_size[1] == 0
    assert query.shape[-1] % 8 == 0
    outputs = []
    cuts = zip(cu_queries.tolist(), cu_keys.tolist(), strict=True)
    for (q0, k0), (q1, k1) in pairwise(cuts):
        assert q1 - q0 <= most_queries
        assert k1 - k0 <= most_keys
        distance = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None] - torch.arange(k1 - k0)
        unseen = distance < 0
        if window_size[0] >= 0:
            unseen |= distance > window_size[0]
        groups = query.shape[1] // key.shape[1]
        keys, values = (x[k0:k1].repeat_interleave(groups, 1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[q0:q1], keys) * scale
        weights = scores.masked_fill(unseen, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
    assert sum(map(len, outputs)) == len(query)
    return torch.cat(outputs)


@pytest.fixture(params=["in blocks", "in one block", "by flash"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Attention:
    """Both; the flash kernels, which want a GPU, by what they are documented to do."""
    monkeypatch.setattr(attention, "BLOCK", 3 if request.param == "in blocks" else 64)
    monkeypatch.setattr(attention, "flash", flash_by_definition)
    return by_flash if request.param == "by flash" else text_by_text


@pytest.mark.parametrize("window", [None, 1, 4, 1000])
@pytest.mark.parametrize(("heads", "grouped", "size"), [(4, 4, 8), (4, 2, 12), (3, 1, 5)])
@pytest.mark.parametrize("at_ends", [False, True])
def test_every_way_is_the_definition(
    way: Attention, window: int | None, heads: int, grouped: int, size: int, at_ends: bool
) -> None:
    draw = random.Random(size)
    prompts = [
        Texts([[0] * (prefix + draw.randint(1, 7)) for _ in range(texts)], prefix)
        for prefix, texts in ((0, 2), (5, 2), (3, 1), (4, 3))
    ]
    layout = pack(prompts).layout
    keys = sum(layout.own)
    plan = Plan(layout.at_ends() if at_ends else layout, torch.device("cpu"))
    torch.manual_seed(0)
    shapes = ((heads, sum(plan.layout.queries)), (grouped, keys), (grouped, keys))
    query, key, value = tensors = [
        torch.randn(1, n, tokens, size, dtype=torch.float64, requires_grad=True)
        for n, tokens in shapes
    ]
    found = way(query, key, value, plan, 0.3, window)
    wanted = slowly(query, key, value, plan, 0.3, window)
    torch.testing.assert_close(found, wanted)
    direction = torch.randn_like(wanted)
    pairs = zip(
        torch.autograd.grad(found, tensors, direction),
        torch.autograd.grad(wanted, tensors, direction),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other)


def test_without_a_scaling_it_is_that_of_the_head_size(way: Attention) -> None:
    plan = Plan(pack([Texts([[1, 2, 3], [1, 4]], 1)]).layout, torch.device("cpu"))
    x = torch.randn(1, 2, 4, 5)
    torch.testing.assert_close(way(x, x, x, plan, None, None), way(x, x, x, plan, 5**-0.5, None))


def test_a_plan_computes_masks_and_calls_once() -> None:
    plan = Plan(pack(prompts_of(0)).layout, torch.device("cpu"))
    assert plan.calls is plan.calls
    one, other = (plan.mask(n, 5, None, torch.float32) for n in (2, 3))
    assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    assert plan.mask(2, 3, None, torch.float32).exp().tolist() == [[1, 1, 0], [1, 1, 1]]
    assert plan.mask(2, 3, 2, torch.float32).exp().tolist() == [[1, 1, 0], [0, 1, 1]]


# --- on a GPU --------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(("heads", "grouped", "size"), [(4, 4, 64), (14, 2, 64), (6, 2, 24)])
@pytest.mark.parametrize("at_ends", [False, True])
def test_flash_attention_is_text_by_text_within_bf16(
    window: int | None, heads: int, grouped: int, size: int, at_ends: bool
) -> None:
    layout = pack(prompts_of(0, 20)).layout
    plan = Plan(layout.at_ends() if at_ends else layout, torch.device("cuda"))
    torch.manual_seed(0)
    keys = sum(layout.own)
    shapes = ((heads, sum(plan.layout.queries)), (grouped, keys), (grouped, keys))
    tensors = [
        torch.randn(1, n, tokens, size, device="cuda", dtype=torch.bfloat16) for n, tokens in shapes
    ]
    exact = [x.float().requires_grad_() for x in tensors]
    half = [x.requires_grad_() for x in tensors]
    (q, k, v), (exact_q, exact_k, exact_v) = half, exact
    found = by_flash(q, k, v, plan, None, window)
    wanted = text_by_text(exact_q, exact_k, exact_v, plan, None, window)
    assert relative(found.float(), wanted) < 0.01
    direction = torch.randn_like(wanted)
    for one, other in zip(
        torch.autograd.grad(found, half, direction.bfloat16()),
        torch.autograd.grad(wanted, exact, direction),
        strict=True,
    ):
        assert relative(one.float(), other) < 0.02


@pytest.mark.cuda
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["Qwen2, Qwen2.5", "Llama 2", "Mistral"])
def test_bf16_rewards_and_gradients_are_those_of_fp32_within_rounding(
    tmp_path: Path, family: str, checkpointing: bool
) -> None:
    exact, half = (model_of(tmp_path / name, family) for name in ("exact", "half"))
    half.load_state_dict(exact.state_dict())
    for module in half.modules():
        if not isinstance(module, nn.Linear) or module is head_of(half.get_base_model()):
            continue
        if not any(parameter.requires_grad for parameter in module.parameters()):
            module.to(torch.bfloat16)
    cast(Any, half.get_base_model()).base_model.embed_tokens.to(torch.bfloat16)
    if checkpointing:
        checkpoint_activations(half)
    half.train()
    batch = pack(prompts_of(0, 20))
    wanted, found = rewards(exact, batch), rewards(half, batch)
    assert relative(found, wanted) < 0.02
    wanted_gradients, found_gradients = gradients(exact, wanted), gradients(half, found)
    for name, gradient in wanted_gradients.items():
        assert relative(found_gradients[name], gradient) < 0.05, name
