"""Attention over a pack: what each text sees, and that packing does not change the rewards."""

import inspect
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from reward.model import attention, scoring
from reward.model.attention import Plan, attend, flash_attention, for_each_query, text_by_text
from reward.model.base import Quantization, add_lora, device, head_of, load_base, new_head
from reward.model.layers import AdaptedLayer, Joint
from reward.model.memory import TooLarge
from reward.model.packing import Pack, Texts, pack
from reward.model.scoring import as_in_transformers, evaluating, require_exact, rewards
from reward.process import Fault
from tests import varlen
from tests.support import (
    FAMILIES,
    FULL,
    SEPARATE,
    SHAPE,
    SLIDING,
    VOCABULARY,
    compute_as_on_a_gpu,
    fetched,
    pair_losses,
    random_prompts,
)

Attention = Callable[..., Tensor]

# Families whose last layer is computed for all tokens.
WITH_WHOLE_LAST_LAYER = {"OPT", "GPT-2"}
PLAIN = Quantization(bits="none", quant_type="nf4", double_quant=False, compute_dtype="float32")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that each text spans several."""
    monkeypatch.setattr(attention, "BLOCK", 8)


ON_GPU = "flash and layers of a GPU"


@pytest.fixture(params=["text by text", "flash"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU path, and the GPU path with flash attention, whose kernels are emulated.

    With ON_GPU, the layers are those of a GPU, too.
    """
    if request.param == ON_GPU:
        compute_as_on_a_gpu(monkeypatch)
    if request.param != "text by text":
        monkeypatch.setattr(attention, "flash", partial(varlen.varlen_attn, enable_gqa=True))
        monkeypatch.setattr(attention, "has_flash", lambda device: True)
        types = (torch.float32, torch.bfloat16)
        monkeypatch.setattr(attention, "FLASH_DTYPES", types)
        monkeypatch.delattr(attention, "scaled_dot_product_attention")
    return request.param


def model_of(folder: Path, family: str, compute_dtype: Any = "float32", **shape: Any) -> PeftModel:
    """A tiny random model of a family with non-zero adapters."""
    targets = FAMILIES[family][2]
    return adapted(fetched(family, folder, **shape), targets, compute_dtype=compute_dtype)


def reward_model(
    folder: Path, kind: str, targets: list[str], *, of_layers: int | None = None, **shape: Any
) -> PeftModel:
    """A tiny random model of any model type with non-zero adapters."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPE | shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return adapted(folder, targets, of_layers)


def adapted(
    folder: Path,
    targets: list[str],
    of_layers: int | None = None,
    compute_dtype: Any = "float32",
) -> PeftModel:
    base = load_base(folder, replace(PLAIN, compute_dtype=compute_dtype))
    new_head(base, 0)
    only = list(range(of_layers)) if of_layers else None
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, layers_to_transform=only)
    lora.init_lora_weights = False
    return add_lora(base, lora)


def stock_rewards(model: PeftModel, prompts: list[Texts]) -> Tensor:
    """Rewards in fp32 from transformers' own decoder, one text at a time: no packs, no padding.

    In half precision it runs in automatic mixed precision.
    """
    dtype: Any = model.get_base_model().dtype
    with (
        as_in_transformers(model) as classifier,
        torch.autocast(device().type, dtype, enabled=dtype != torch.float32),
    ):
        ends = [
            classifier.base_model(
                input_ids=torch.tensor([ids], device=device()), use_cache=False
            ).last_hidden_state[0, -1]
            for texts in prompts
            for ids in texts.ids
        ]
    return cast(Tensor, head_of(classifier)(torch.stack(ends).float())[:, 0])


def gradients(model: PeftModel, found: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    pair_losses(found).mean().backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def checkpoint_activations(model: PeftModel) -> None:
    classifier = cast(PreTrainedModel, model.get_base_model())
    classifier.activation_checkpointing_enable({"use_reentrant": False})


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# --- packs against single texts --------------------------------------------------------------


def test_model_may_change_projections_in_place(tmp_path: Path) -> None:
    """As OLMo does, which clips queries, keys and values."""
    model, prompts = reward_model(tmp_path, "olmo", SEPARATE, clip_qkv=0.2), random_prompts(3)
    expected = gradients(model, stock_rewards(model, prompts))
    for name, gradient in gradients(model, rewards(model, pack(prompts))).items():
        assert relative(gradient, expected[name]) < 1e-5


def test_output_is_contiguous_as_some_models_need() -> None:
    """JetMoE calls view on it."""
    batch = pack(random_prompts(0))
    query, key, value = torch.randn(3, 1, 2, batch.input_ids.shape[1], 8)
    found = text_by_text(query, key, value, Plan(batch.layout, device()), None, None)
    assert found.is_contiguous()


def test_repeated_key_heads_match_shared_ones() -> None:
    query, key, value = (torch.randn(1, heads, 9, 8) for heads in (6, 2, 2))
    found = scaled_dot_product_attention(
        query, for_each_query(key, 6), for_each_query(value, 6), is_causal=True
    )
    expected = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert relative(found, expected) < 1e-6
    assert for_each_query(key, 2) is key


def test_only_a_cpu_lets_query_heads_share_key_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def record(query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Tensor:
        seen.append((key.shape[1], value.shape[1], options["enable_gqa"]))
        return query

    monkeypatch.setattr(attention, "scaled_dot_product_attention", record)
    batch = pack(random_prompts(0))
    for place, expected in (("cpu", (2, 2, True)), ("meta", (6, 6, False))):
        seen.clear()
        size = batch.input_ids.shape[1]
        query, key, value = (torch.empty(1, n, size, 8, device=place) for n in (6, 2, 2))
        text_by_text(query, key, value, Plan(batch.layout, torch.device(place)), None, None)
        assert set(seen) == {expected}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("path", ["text by text", "flash", ON_GPU], indirect=True)
@pytest.mark.usefixtures("path")
def test_rewards_and_gradients_match_stock_passes(
    tmp_path: Path, family: str, checkpointing: bool
) -> None:
    model, prompts = model_of(tmp_path, family), random_prompts(0)
    expected = stock_rewards(model, prompts)
    expected_gradients = gradients(model, expected)
    if checkpointing:
        checkpoint_activations(model)
    model.train()
    found = rewards(model, pack(prompts))
    found_gradients = gradients(model, found)
    assert relative(found, expected) < 1e-5
    assert expected_gradients.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert found_gradients.keys() == expected_gradients.keys()
    bound = 5e-5 if family in ("GPT-2", "OPT", "Phi") else 1e-5
    for name, gradient in expected_gradients.items():
        assert gradient.norm() > 0, name
        assert relative(found_gradients[name], gradient) < bound, name


def joints_of(model: PeftModel) -> set[Joint]:
    return {each.joint for each in model.modules() if isinstance(each, AdaptedLayer) and each.joint}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("path", [ON_GPU], indirect=True)
@pytest.mark.usefixtures("path")
def test_projections_of_every_layer_are_computed_together(tmp_path: Path, family: str) -> None:
    """If query, key and value have an adapter each; no output waits after a pass."""
    model = model_of(tmp_path, family)
    joints = joints_of(model)
    assert len(joints) == (3 if FAMILIES[family][2] == SEPARATE else 0)
    rewards(model, pack(random_prompts(0))).sum().backward()
    assert not any(joint.waiting or joint.x is not None for joint in joints)


@pytest.mark.parametrize("path", [ON_GPU], indirect=True)
@pytest.mark.usefixtures("path")
def test_failed_pass_leaves_no_output_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Qwen3, a norm of the queries comes before the keys."""
    model = model_of(tmp_path, "Qwen3")
    seen: list[Joint] = []

    def fail(_: Tensor) -> Tensor:
        seen.extend(joint for joint in joints_of(model) if joint.waiting)
        raise torch.OutOfMemoryError

    norms = [each for name, each in model.named_modules() if name.endswith("q_norm")]
    monkeypatch.setattr(norms[1], "forward", fail)
    with pytest.raises(torch.OutOfMemoryError):
        rewards(model, pack(random_prompts(0)))
    assert len(seen) == 1
    assert not any(joint.waiting or joint.x is not None for joint in joints_of(model))


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - WITH_WHOLE_LAST_LAYER))
def test_last_layer_computes_only_the_last_tokens(tmp_path: Path, family: str) -> None:
    model, prompts = model_of(tmp_path, family), random_prompts(1)
    layers = cast(Any, model.get_base_model()).base_model.layers
    seen: list[int] = []
    for layer in layers:
        layer.mlp.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    rewards(model, pack(prompts))
    whole = pack(prompts).input_ids.shape[1]
    assert seen == [whole, whole, 2 * len(prompts)]


@pytest.mark.parametrize("last", ["rotated", "not rotated"])
def test_last_layer_without_positions_matches_stock_passes(last: str, tmp_path: Path) -> None:
    """No layer of Cohere Compass gets position_ids, and one that is not rotated gets None."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
    shape: dict[str, Any] = {
        "layer_types": [SLIDING, SLIDING, FULL],
        "sliding_window": 7,
        "rope_parameters": {SLIDING: rope, FULL: rope if last == "rotated" else None},
    }
    model = reward_model(tmp_path, "cohere_compass_text", SEPARATE, **shape)
    prompts = random_prompts(1)
    assert relative(rewards(model, pack(prompts)), stock_rewards(model, prompts)) < 1e-5


@pytest.mark.usefixtures("path")
def test_adapters_on_lower_layers_only_have_the_same_gradients(tmp_path: Path) -> None:
    model = reward_model(tmp_path, "qwen2", SEPARATE, of_layers=1)
    prompts = random_prompts(2)
    expected = gradients(model, stock_rewards(model, prompts))
    found = gradients(model, rewards(model, pack(prompts)))
    assert len(found) == 7
    for name, gradient in expected.items():
        assert relative(found[name], gradient) < 1e-5


@pytest.mark.usefixtures("path")
def test_three_texts_of_a_prompt_match_stock_passes(tmp_path: Path) -> None:
    model = reward_model(tmp_path, "llama", SEPARATE)
    draw = random.Random(4)
    prompts = [
        Texts([[5, 6, 7] + [draw.randrange(3, 300) for _ in range(n + k)] for k in range(n)], 3)
        for n in (1, 3, 2, 5)
    ]
    found = rewards(model, pack(prompts))
    assert found.shape == (11,)
    assert relative(found, stock_rewards(model, prompts)) < 1e-5


@pytest.mark.usefixtures("path")
def test_reward_does_not_depend_on_the_rest_of_the_pack(tmp_path: Path) -> None:
    """Alone or in any pack and order, rewards agree within 1e-6 of their norm (fp32 rounding)."""
    model, prompts = reward_model(tmp_path, "qwen2", SEPARATE), random_prompts(5, 12)
    with torch.no_grad(), evaluating(model):
        expected = torch.cat([rewards(model, pack([texts])) for texts in prompts]).view(-1, 2)
        for seed, size in ((0, 12), (1, 5), (2, 2)):
            order = random.Random(seed).sample(range(12), 12)
            for start in range(0, 12, size):
                group = order[start : start + size]
                found = rewards(model, pack([prompts[index] for index in group])).view(-1, 2)
                assert relative(found, expected[group]) < 1e-6


@pytest.mark.parametrize("changed", [0, 1])
@pytest.mark.usefixtures("path")
def test_tokens_of_one_answer_never_change_the_reward_of_the_other(
    tmp_path: Path, changed: int
) -> None:
    model, prompts = reward_model(tmp_path, "qwen2", SEPARATE), random_prompts(6)
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


# --- windows, and models that are refused ----------------------------------------------------


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("mistral", {"sliding_window": 7}),
        ("qwen2", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}),
        ("phi3", {"sliding_window": 7}),
        ("gemma3_text", {"sliding_window": 7, "head_dim": 16}),
    ],
)
@pytest.mark.usefixtures("path")
def test_sliding_window_is_respected(tmp_path: Path, family: str, shape: dict[str, Any]) -> None:
    targets = ["qkv_proj"] if family == "phi3" else SEPARATE
    model, prompts = reward_model(tmp_path, family, targets, **shape), random_prompts(7)
    expected = stock_rewards(model, prompts)
    assert relative(rewards(model, pack(prompts)), expected) < 1e-5
    expected_gradients = gradients(model, expected)
    for name, gradient in gradients(model, rewards(model, pack(prompts))).items():
        assert relative(gradient, expected_gradients[name]) < 1e-5
    cast(Any, model.config).sliding_window = None
    for module in model.modules():
        if hasattr(module, "sliding_window"):
            cast(Any, module).sliding_window = None
    assert relative(rewards(model, pack(prompts)), expected) > 1e-3


@pytest.mark.parametrize(
    ("family", "fault"),
    [
        ("gemma2", "Gemma2Attention uses softcap in its attention, expected plain causal"),
        ("gpt_oss", "GptOssAttention uses s_aux in its attention"),
        ("stablelm", "StableLmAttention does not receive the layout of its row"),
        ("falcon", "FalconForSequenceClassification does not allow its attention"),
        ("bloom", "BloomForSequenceClassification does not allow its attention"),
        ("cohere", "transformers has no sequence classifier for cohere"),
    ],
)
def test_unsupported_attention_is_refused_and_named(
    tmp_path: Path, family: str, fault: str
) -> None:
    targets = ["query_key_value"] if family in ("falcon", "bloom") else SEPARATE
    shape = {"head_dim": 16} if family in ("gemma2", "gpt_oss") else {}
    with pytest.raises(Fault, match=fault):
        rewards(reward_model(tmp_path, family, targets, **shape), pack(random_prompts(0)))


def test_mask_passed_by_a_model_is_refused() -> None:
    x = torch.zeros(1, 1, 3, 4)
    plan = Plan(pack([Texts([[1, 2], [1, 3]], 1)]).layout, x.device)
    with pytest.raises(Fault, match="Identity uses its own mask in its attention"):
        attend(nn.Identity(), x, x, x, torch.zeros(1, 1, 3, 3), plan=plan)


def test_model_with_different_rewards_in_packs_is_refused(tmp_path: Path) -> None:
    model = reward_model(tmp_path, "qwen2", SEPARATE)
    texts = random_prompts(8)[1]
    require_exact(model.train(), [texts])
    assert model.training
    assert cast(Any, model.config)._attn_implementation == attention.NAME
    layer = cast(Any, model.get_base_model()).base_model.layers[0]

    def mixing(_: Any, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + given[0].mean(1, keepdim=True)

    layer.mlp.register_forward_hook(mixing)
    with pytest.raises(
        Fault,
        match=r"^Qwen2ForSequenceClassification: the hidden states of a pair of \d+ tokens in ",
    ):
        require_exact(model, [texts])


def test_rounding_amplified_by_trained_adapters_is_accepted(tmp_path: Path) -> None:
    """In half precision, adapters amplify rounding differences between packs and single texts."""
    model = reward_model(tmp_path, "qwen2", SEPARATE)
    texts = random_prompts(8)[1]

    def mixing(_: Any, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + given[0].mean(1, keepdim=True)

    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(mixing)
    require_exact(model, [texts])


@pytest.mark.parametrize(("room", "checked"), [(10**6, 5), (120, 3), (100, 2)])
def test_fewer_pairs_are_checked_if_memory_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, checked: int
) -> None:
    model = reward_model(tmp_path, "qwen2", SEPARATE)
    pairs = [
        Texts([[*range(3, 3 + size)], [5, *range(9, 8 + size)]], 0) for size in (30, *[12] * 4)
    ]
    original, tried = scoring.last_hidden, []

    def limited(model: PeftModel, batch: Pack) -> Tensor:
        if batch.input_ids.shape[1] > room:
            raise torch.OutOfMemoryError
        tried.append(len(batch.order) // 2)
        return original(model, batch)

    monkeypatch.setattr(scoring, "last_hidden", limited)
    require_exact(model, pairs)
    assert tried == [checked]
    room = 60
    with pytest.raises(TooLarge, match="the check of packs: out of memory"):
        require_exact(model, pairs)


@pytest.mark.parametrize(("longer", "exact"), [(60, True), (70, False)])
def test_short_pair_is_also_compared_next_to_a_long_one(
    tmp_path: Path, longer: int, exact: bool
) -> None:
    """LongRoPE changes its factors for a whole row if any text has more than 64 tokens."""
    model = model_of(tmp_path, "Phi-4-mini", initializer_range=0.3)
    pairs = [Texts([[*range(3, 3 + size)], [5, *range(9, 8 + size)]], 0) for size in (longer, 9, 6)]
    for pair in pairs:
        require_exact(model, [pair])
    if exact:
        require_exact(model, pairs)
        return
    with pytest.raises(Fault, match=r"of a pair of 12 tokens in a pack of \d+ differ by"):
        require_exact(model, pairs)


def test_dropout_is_on_in_adapters_and_off_in_the_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("phi", **SHAPE, resid_pdrop=0.5, attention_dropout=0.5)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    base = load_base(tmp_path, PLAIN)
    new_head(base, 0)
    lora = LoraConfig(r=4, lora_dropout=0.5, target_modules=SEPARATE, init_lora_weights=False)
    model, batch = add_lora(base, lora), pack(random_prompts(9))
    drops = {
        name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)
    }
    assert {p for name, p in drops.items() if "lora" in name} == {0.5}
    assert {p for name, p in drops.items() if "lora" not in name} == {0.0}
    model.train()
    assert not torch.equal(rewards(model, batch), rewards(model, batch))
    with model.disable_adapter():
        assert torch.equal(rewards(model, batch), rewards(model, batch))


# --- the two implementations -----------------------------------------------------------------


def slow_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, scaling: float, window: int | None
) -> Tensor:
    """Attention by its definition, one query and one head at a time: [1, queries, heads, size]."""
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


@pytest.fixture(params=["in blocks", "in one block", "flash"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Attention:
    """Both implementations; the flash kernels, which need a GPU, are emulated as documented."""
    monkeypatch.setattr(attention, "BLOCK", 3 if request.param == "in blocks" else 64)
    monkeypatch.setattr(attention, "flash", partial(varlen.varlen_attn, enable_gqa=True))
    return flash_attention if request.param == "flash" else text_by_text


@pytest.mark.parametrize("window", [None, 1, 4, 1000])
@pytest.mark.parametrize(("heads", "grouped", "size"), [(4, 4, 8), (4, 2, 12), (3, 1, 5)])
@pytest.mark.parametrize("at_ends", [False, True])
def test_implementations_match_the_definition(
    implementation: Attention,
    window: int | None,
    heads: int,
    grouped: int,
    size: int,
    at_ends: bool,
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
    found = implementation(query, key, value, plan, 0.3, window)
    expected = slow_attention(query, key, value, plan, 0.3, window)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(expected)
    pairs = zip(
        torch.autograd.grad(found, tensors, direction),
        torch.autograd.grad(expected, tensors, direction),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other)


def test_scaling_defaults_to_the_head_size(implementation: Attention) -> None:
    plan = Plan(pack([Texts([[1, 2, 3], [1, 4]], 1)]).layout, torch.device("cpu"))
    x = torch.randn(1, 2, 4, 5)
    torch.testing.assert_close(
        implementation(x, x, x, plan, None, None), implementation(x, x, x, plan, 5**-0.5, None)
    )


def test_plan_computes_masks_and_call_once() -> None:
    plan = Plan(pack(random_prompts(0)).layout, torch.device("cpu"))
    assert plan.call is plan.call
    one, other = (plan.mask(n, 5, None, torch.float32) for n in (2, 3))
    assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    assert plan.mask(2, 3, None, torch.float32).exp().tolist() == [[1, 1, 0], [1, 1, 1]]
    assert plan.mask(2, 3, 2, torch.float32).exp().tolist() == [[1, 1, 0], [0, 1, 1]]


# --- half precision --------------------------------------------------------------------------


def require_as_close_as_stock(
    folder: Path, family: str, checkpointing: bool, factor: float = 1.5
) -> None:
    """Require bf16 rewards and gradients to be as close to fp32 as those of transformers.

    All use the same weights. The order of operations alone may make an error `factor` times as
    large.
    """
    prompts = random_prompts(0, 20)
    half = model_of(folder / "half", family, "bfloat16")
    exact = model_of(folder / "exact", family)
    exact.load_state_dict(half.state_dict())
    expected, stock = stock_rewards(exact, prompts), stock_rewards(half, prompts)
    expected_gradients, stock_gradients = gradients(exact, expected), gradients(half, stock)
    if checkpointing:
        checkpoint_activations(half)
    found = rewards(half.train(), pack(prompts))
    found_gradients = gradients(half, found)
    assert relative(found, expected) < factor * relative(stock, expected)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert relative(found_gradients[name], gradient) < factor * relative(
            stock_gradients[name], gradient
        ), name


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["Qwen2, Qwen2.5", "Llama 2", "Mistral"])
@pytest.mark.parametrize(
    ("path", "factor"), [("text by text", 1.5), ("flash", 1.5), (ON_GPU, 2)], indirect=["path"]
)
def test_half_precision_is_as_close_to_fp32_as_transformers(
    tmp_path: Path, family: str, checkpointing: bool, factor: float
) -> None:
    require_as_close_as_stock(tmp_path, family, checkpointing, factor)


# --- the GPU path ----------------------------------------------------------------------------


def test_varlen_attention_is_called_with_the_signature_of_each_torch() -> None:
    """The installed torch is a known version, and the emulation has the same parameter names."""
    version = ".".join(torch.__version__.split(".")[:2])
    assert tuple(inspect.signature(varlen_attn).parameters) == varlen.PARAMETERS[version]
    emulated = inspect.signature(varlen.varlen_attn).parameters
    for names in varlen.PARAMETERS.values():
        declared = inspect.Signature(
            [inspect.Parameter(name, kind_of_parameter(name)) for name in names]
        )
        of_that_version: Any = lambda: None  # noqa: E731
        of_that_version.__signature__ = declared
        asked = attention.gqa_flag(of_that_version)
        assert asked == ({"enable_gqa": True} if "enable_gqa" in names else {})
        declared.bind_partial(*range(7), scale=1.0, window_size=(-1, 0), **asked)
        assert set(names) >= set(emulated) - {"enable_gqa"}
    for name, parameter in inspect.signature(varlen_attn).parameters.items():
        assert parameter.kind == kind_of_parameter(name)
        assert name not in emulated or emulated[name].default == parameter.default


def kind_of_parameter(name: str) -> Any:
    """The first seven parameters are positional, the others are keywords."""
    positional = name in varlen.COMMON[:7]
    return inspect.Parameter.POSITIONAL_OR_KEYWORD if positional else inspect.Parameter.KEYWORD_ONLY


def test_window_around_a_query_is_aligned_at_the_last_key() -> None:
    """Checks the emulation with a text of 2 queries and 4 keys whose values encode positions."""
    query, key, value = torch.zeros(2, 1, 8), torch.zeros(4, 1, 8), torch.zeros(4, 1, 8)
    value[:, 0, 0] = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    cu_queries, cu_keys = (torch.tensor([0, rows], dtype=torch.int32) for rows in (2, 4))
    for window, seen in (
        ((-1, -1), (1111 / 4, 1111 / 4)),
        ((-1, 0), (111 / 3, 1111 / 4)),
        ((1, 0), (110 / 2, 1100 / 2)),
        ((0, 1), (1100 / 2, 1000)),
    ):
        found = varlen.varlen_attn(query, key, value, cu_queries, cu_keys, 2, 4, window_size=window)
        assert found[:, 0, 0].tolist() == pytest.approx(seen)


@pytest.mark.parametrize("path", ["flash"], indirect=True)
@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("size", [12, 16])
def test_layer_makes_one_flash_attention_call_with_head_size_a_multiple_of_8(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = (
        reward_model(tmp_path, "llama", SEPARATE, **{"head_dim": size}),
        random_prompts(10),
    )
    emulated, seen = attention.flash, []

    def counted(query: Tensor, *rest: Any, **more: Any) -> Tensor:
        seen.append((len(query), query.shape[-1]))
        return emulated(query, *rest, **more)

    monkeypatch.setattr(attention, "flash", counted)
    found = rewards(model, pack(prompts))
    own = pack(prompts).layout.own
    assert seen == [(sum(own), 16)] * 2 + [(10, 16)]
    expected = stock_rewards(model, prompts)
    assert relative(found, expected) < 1e-5
    expected_gradients = gradients(model, expected)
    for name, gradient in gradients(model, rewards(model, pack(prompts))).items():
        assert relative(gradient, expected_gradients[name]) < 1e-5, name


def test_kernels_get_only_supported_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(dtype: torch.dtype, size: int = 64, of_values: int = 64) -> bool:
        return attention.uses_flash(
            torch.zeros(1, dtype=dtype).expand(1, 2, 3, size), torch.zeros(1, 2, 3, of_values)
        )

    assert not taken(torch.bfloat16)
    for number, there in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device, found=number: found)
        assert attention.has_flash.__wrapped__(torch.device("cuda")) == there
    monkeypatch.setattr(attention, "has_flash", lambda device: True)
    assert taken(torch.bfloat16)
    assert taken(torch.float16, 256, 256)
    assert not taken(torch.float32)
    assert taken(torch.bfloat16, 192, 128)
    assert not taken(torch.bfloat16, 264, 264)
    assert not taken(torch.bfloat16, 264, 64)


def test_last_layer_shares_keys_with_other_layers() -> None:
    """So it needs no extra transfer to a busy GPU."""
    plan = Plan(pack(random_prompts(0)).layout, torch.device("cpu"))
    x = torch.zeros(0)
    whole, last = plan.call, attention.LastTokens(plan, (x, x)).call
    assert last.keys is whole.keys
    assert last.cu_keys is whole.cu_keys
    assert (last.max_queries, last.max_keys) == (1, whole.max_keys)
    assert last.cu_queries.tolist() == [*range(11)]
    assert last.cu_queries.dtype == torch.int32


def test_mask_for_a_gpu_owns_its_memory() -> None:
    """It is aligned, as GPU kernels require; `meta` stands in for a device other than the CPU."""
    layout = pack(random_prompts(0, 20)).layout
    plan = Plan(layout, torch.device("meta"))
    most = max(before + own for before, own in zip(layout.prefix, layout.own, strict=True))
    assert plan.block == most
    for queries, keys in ((3, 5), (most, most), (1, most)):
        mask = plan.mask(queries, keys, None, torch.float32)
        assert mask.shape == (queries, keys)
        assert mask.storage_offset() == 0
        assert mask.is_contiguous()


# --- on a GPU --------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(("heads", "grouped", "size"), [(4, 4, 64), (14, 2, 64), (6, 2, 24)])
@pytest.mark.parametrize("at_ends", [False, True])
def test_flash_attention_matches_text_by_text_up_to_bf16_rounding(
    window: int | None, heads: int, grouped: int, size: int, at_ends: bool
) -> None:
    layout = pack(random_prompts(0, 20)).layout
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
    found = flash_attention(q, k, v, plan, None, window)
    expected = text_by_text(exact_q, exact_k, exact_v, plan, None, window)
    assert relative(found.float(), expected) < 0.01
    direction = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, half, direction.bfloat16()),
        torch.autograd.grad(expected, exact, direction),
        strict=True,
    ):
        assert relative(one.float(), other) < 0.02


@pytest.mark.cuda
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["Qwen2, Qwen2.5", "Llama 2", "Mistral"])
def test_half_precision_on_a_gpu_is_as_close_to_fp32_as_transformers(
    tmp_path: Path, family: str, checkpointing: bool
) -> None:
    require_as_close_as_stock(tmp_path, family, checkpointing)


def test_small_difference_is_refused_in_full_precision(tmp_path: Path) -> None:
    model = reward_model(tmp_path, "qwen2", SEPARATE)
    layer = cast(Any, model.get_base_model()).base_model.layers[0]

    def mix(_: nn.Module, given: tuple[Tensor, ...], found: Tensor) -> Tensor:
        return found + 0.01 * given[0].mean(1, keepdim=True)

    layer.mlp.register_forward_hook(mix)
    with pytest.raises(Fault, match=r"differ by 0\.0\d+ from .* alone, expected at most 0\.001"):
        require_exact(model, [random_prompts(8)[1]])
