"""A model folder from an untrusted source: its code never runs, however it is loaded."""

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from reward.exporting import clients
from reward.exporting.exported import load_exported, require_no_code
from reward.model.base import DIGESTS
from reward.outputs import digests, read_json, write_json
from reward.process import Fault
from reward.serving import score, serve
from reward.serving.scorer import reward_function
from stages import evaluate, export

pytestmark = pytest.mark.usefixtures("project")
CODE = """
from pathlib import Path

from transformers import Qwen2Config, Qwen2ForSequenceClassification

Path({canary!r}).touch()

class OwnConfig(Qwen2Config):
    model_type = "own"

class Own(Qwen2ForSequenceClassification):
    config_class = OwnConfig
"""
AUTO_MAP = {
    "AutoConfig": "modeling_own.OwnConfig",
    "AutoModelForSequenceClassification": "modeling_own.Own",
}


WAYS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "score": (score.main, ["score", "data/raw/pairs.json", "--output", "out.jsonl"]),
    "serve": (serve.main, ["serve", "--port", "0"]),
    "reward_function": (lambda: reward_function(export.EXPORT), []),
    "clients": (clients.main, ["clients", "request.json"]),
}


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that hostile code would create; transformers would copy that code to a cache."""
    cache = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(cache))
    monkeypatch.setattr("sys.path", [*sys.path, str(cache)])
    return tmp_path / "ran"


def add_code(base: Path, canary: Path, **changes: Any) -> None:
    """Add code to the folder of a base, and have its configuration refer to it."""
    (base / "modeling_own.py").write_text(CODE.format(canary=str(canary)), encoding="utf-8")
    config = read_json(base / "config.json") | {"auto_map": AUTO_MAP} | changes
    write_json(base / "config.json", config)


def seal_again(folder: Path) -> None:
    """Update the digests of an exported folder to its content, as an attacker could."""
    record = read_json(folder / DIGESTS)
    record["files"] = digests(folder)
    del record["files"][DIGESTS]
    write_json(folder / DIGESTS, record)


@pytest.mark.parametrize("model_type", ["own", "qwen2"])
@pytest.mark.parametrize("way", WAYS)
def test_code_in_an_exported_folder_never_runs(
    way: str, model_type: str, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_code(export.EXPORT / "base", canary, model_type=model_type)
    seal_again(export.EXPORT)
    folder, pairs, base = map(str, (export.EXPORT, export.TEST, export.BASE))
    request = clients.Request(folder, pairs, base, "light", 4096, [])
    write_json(Path("request.json"), asdict(request))
    run, arguments = WAYS[way]
    monkeypatch.setattr("asyncio.run", lambda server: server.close())
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(Fault, match=r"modeling_own\.py, base/config\.json is code or names code"):
        run()
    assert not canary.exists()


@pytest.mark.parametrize("stage", [evaluate, export])
def test_code_in_a_base_never_runs(stage: Any, canary: Path) -> None:
    """Base and adapter come from someone else's cache, with digests and records that all match."""
    add_code(export.BASE, canary, model_type="own")
    base, adapter = map(read_json, (export.BASE / "base.json", evaluate.ADAPTER / DIGESTS))
    base["files"] = digests(export.BASE)
    del base["files"]["base.json"]
    write_json(export.BASE / "base.json", base)
    write_json(evaluate.ADAPTER / DIGESTS, adapter | {"base": base["files"]})
    with pytest.raises(Fault, match=r"models/base contains code \(modeling_own\.py\)"):
        stage.main()
    (export.BASE / "modeling_own.py").unlink()
    del base["files"]["modeling_own.py"]
    write_json(export.BASE / "base.json", base)
    write_json(evaluate.ADAPTER / DIGESTS, adapter | {"base": base["files"]})
    with pytest.raises(Fault, match="transformers has no sequence classifier for own"):
        stage.main()
    assert not canary.exists()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("merged/config.json", {"auto_map": {"AutoModel": "stranger/model--own.Own"}}),
        ("merged/config.json", {"text_config": {"auto_map": AUTO_MAP}}),
        ("merged/config.json", {"custom_pipelines": {"own": {"impl": "own.Pipeline"}}}),
        ("merged/config.json", {"layers": [{"auto_map": AUTO_MAP}]}),
        ("base/config.json", {"attn_implementation": "evil/kernel"}),
        # For which transformers downloads a kernel if the package is missing.
        ("base/config.json", {"_attn_implementation": "flash_attention_2"}),
        # Instead of config.json, transformers reads the file that is for its version.
        ("base/config.json", {"configuration_files": ["config.4.0.0.json"]}),
        ("base/config.json", {"_attn_implementation": "paged|evil/kernel@v1:attention"}),
        ("base/config.json", {"text_config": {"attn_implementation": {"": "evil/kernel"}}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.Own", None]}}),
        ("adapter_config.json", {"megatron_config": {"a": 1}, "megatron_core": "own"}),
        ("adapter_config.json", {"auto_mapping": {"parent_library": "own"}}),
    ],
)
def test_configuration_that_names_code_is_a_fault(name: str, change: dict[str, Any]) -> None:
    path = export.EXPORT / name
    write_json(path, read_json(path) | change)
    seal_again(export.EXPORT)
    with pytest.raises(Fault, match=f"models/export: {name} is code or names code"):
        load_exported(export.EXPORT)


def test_kernel_that_a_base_on_the_hub_names_never_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with code, the digests are the stranger's own."""
    base, revision = export.EXPORT / "base", "a" * 40
    config = read_json(base / "config.json") | {"_attn_implementation": "evil/kernel"}
    write_json(base / "config.json", config)
    snapshot = tmp_path / "models--stranger--nice" / "snapshots" / revision
    snapshot.parent.mkdir(parents=True)
    base.rename(snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = export.EXPORT / "adapter_config.json"
    write_json(
        path,
        read_json(path) | {"base_model_name_or_path": "stranger/nice", "revision": revision},
    )
    seal_again(export.EXPORT)
    record = read_json(export.EXPORT / DIGESTS)
    write_json(export.EXPORT / DIGESTS, record | {"base": digests(snapshot)})
    with pytest.raises(Fault, match=r"config\.json names an attention for which"):
        load_exported(export.EXPORT)


@pytest.mark.parametrize("method", ["mxfp4", "eetq", None])
def test_quantization_for_which_transformers_may_download_a_kernel_is_a_fault(
    method: str | None,
) -> None:
    path = export.EXPORT / "base/config.json"
    stored = {"quant_method": method, "load_in_4bit": True}
    write_json(path, read_json(path) | {"quantization_config": stored})
    seal_again(export.EXPORT)
    with pytest.raises(Fault, match="a quantization_config other than bitsandbytes in 4 bits"):
        load_exported(export.EXPORT)


@pytest.mark.parametrize(
    ("name", "part", "found"),
    [
        ("base/model.safetensors", "embed_tokens.weight", "lacks the weight model.embed_tokens"),
        ("base/model.safetensors", "model.norm.weight", "lacks the weight model.norm.weight"),
        ("adapter_model.safetensors", "layers.0.", "lacks weights for layers that its adapter_con"),
    ],
)
def test_weights_that_are_missing_are_not_drawn_at_random(name: str, part: str, found: str) -> None:
    path = export.EXPORT / name
    tensors = load_file(path)
    kept = {key: value for key, value in tensors.items() if part not in key}
    assert len(kept) < len(tensors)
    save_file(kept, path, metadata={"format": "pt"})
    seal_again(export.EXPORT)
    with pytest.raises(Fault, match=found):
        load_exported(export.EXPORT)


def test_code_behind_a_link_to_a_folder_is_a_fault() -> None:
    base = export.EXPORT / "base"
    base.rename("elsewhere")
    Path("elsewhere/modeling_own.py").touch()
    Path("elsewhere/loop").symlink_to(Path().resolve())
    base.symlink_to(Path("elsewhere").resolve())
    with pytest.raises(Fault, match=r"base/modeling_own\.py.* is code or names code"):
        load_exported(export.EXPORT)


def test_attention_without_a_kernel_names_no_code() -> None:
    path = export.EXPORT / "base/config.json"
    safe = {"_attn_implementation": "sdpa", "_attn_implementation_autoset": True}
    write_json(path, read_json(path) | safe)
    require_no_code(export.EXPORT)


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "template.json", "quantization.json", "tokenizer.json"]
)
def test_export_that_lacks_a_file_is_not_loaded(name: str) -> None:
    path = export.EXPORT / name
    path.rename(path.with_suffix(".bin"))
    seal_again(export.EXPORT)
    with pytest.raises(Fault, match=rf"digests\.json lacks {name}, expected a complete export"):
        load_exported(export.EXPORT)


def test_base_that_contains_an_adapter_is_not_loaded() -> None:
    """Its configuration would name another base, which transformers would download."""
    write_json(
        export.EXPORT / "base/adapter_config.json", {"base_model_name_or_path": "stranger/nice"}
    )
    with pytest.raises(Fault, match=r"base contains adapter_config\.json, from which transformers"):
        load_exported(export.EXPORT)


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "XLORA", "adapters": {"0": "stranger/nice"}},
        {"peft_type": "SHADOW", "shadow_model": "stranger/nice"},
        {"peft_type": None},
    ],
)
def test_adapter_that_may_name_other_models_is_not_loaded(change: dict[str, Any]) -> None:
    path = export.EXPORT / "adapter_config.json"
    write_json(path, read_json(path) | change)
    seal_again(export.EXPORT)
    with pytest.raises(Fault, match=r"adapter_config\.json: peft_type is .*, expected LORA"):
        load_exported(export.EXPORT)


def test_export_contains_no_code() -> None:
    require_no_code(export.EXPORT)


@pytest.mark.parametrize("name", ["own.so", "own.pyc"])
def test_compiled_code_is_a_fault(name: str) -> None:
    (export.EXPORT / "base" / name).touch()
    with pytest.raises(Fault, match=rf"models/export: base/{name} is code or names code"):
        require_no_code(export.EXPORT)
