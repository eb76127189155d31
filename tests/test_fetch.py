"""Fetch: what it copies to models/base from a folder or a hub, and what it refuses."""

import errno
import json
import logging
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from reward.model.suitable import problem_with
from reward.outputs import digest, digests, read_json
from reward.process import Fault
from stages import fetch
from tests.support import SHAPE, save_family

ROOT = Path(__file__).parent.parent
MAIN, SIDE = "a" * 40, "b" * 40
SECRET = "hf_secretsecretsecretsecretsecretsec"
TEXTS = [
    "Hello  world, it's 12345.\n\n答:四十二。",
    " leading and trailing ",
    "<|im_start|>user\nhi<|im_end|></s><unk>",
    "é e\u0301 👩‍👩‍👧 \t\r\n",
    "",
]

SetParams = Callable[..., None]
CARD = {"license": "other", "license_name": "own", "license_link": "LICENSE", "tags": ["chat"]}
LICENSE = {name: value for name, value in CARD.items() if name != "tags"}

pytestmark = pytest.mark.usefixtures("no_network", "here")


@dataclass
class Repository:
    """A model on the fake hub: files by commit, commits by branch, and access."""

    commits: dict[str, Path]
    branches: dict[str, str]
    gated: bool = False
    metadata_gated: bool = False


@dataclass
class Hub:
    """A local hub that records its requests."""

    endpoint: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    downloads: list[str] = field(default_factory=list)
    revisions: set[str] = field(default_factory=set)
    tokens: set[str | None] = field(default_factory=set)
    page: bytes | None = None

    def add(self, name: str, folder: Path, **options: bool) -> Repository:
        repository = Repository({MAIN: folder}, {"main": MAIN, MAIN: MAIN}, **options)
        self.repositories[name] = repository
        return repository


def answer(hub: Hub, path: str) -> tuple[int, dict[str, str], bytes]:
    """The status, headers and body of a path, as in the Hub's API."""
    if hub.page is not None:
        return 200, {}, hub.page
    parts = path.strip("/").split("/")
    name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
    repository = hub.repositories.get(name)
    if repository is None:
        return 404, {"X-Error-Code": "RepoNotFound"}, b""
    kind, revision = (parts[4], parts[5]) if parts[0] == "api" else (parts[2], parts[3])
    commit = repository.branches.get(revision)
    if commit is None:
        return 404, {"X-Error-Code": "RevisionNotFound"}, b""
    if repository.metadata_gated or (repository.gated and kind == "resolve"):
        return 403, {"X-Error-Code": "GatedRepo"}, b""
    folder = repository.commits[commit]
    if kind == "revision":
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        siblings = [{"rfilename": file.relative_to(folder).as_posix()} for file in files]
        found = {"id": name, "sha": commit, "siblings": siblings}
        return 200, {}, json.dumps(found).encode()
    file = folder / "/".join(parts[4:])
    return 200, {"ETag": f'"{digest(file)}"', "X-Repo-Commit": commit}, file.read_bytes()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail at once if a test resolves an address outside this machine."""
    resolve = socket.getaddrinfo

    def local(host: Any, *arguments: Any, **options: Any) -> Any:
        if host not in ("127.0.0.1", b"127.0.0.1"):
            pytest.fail(f"an outside address was asked for: {host!r}")
        return resolve(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", local)


@pytest.fixture
def closed_address() -> str:
    """A local address on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Set the two constants that huggingface_hub derives from HF_ENDPOINT on import."""
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub that huggingface_hub uses in this process, with an empty cache and no token."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = answer(served, self.path.split("?")[0])
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if "org/" in self.path:
                served.tokens.add(self.headers["Authorization"])
            if self.command == "GET":
                self.wfile.write(body)
                if "/resolve/" in self.path:
                    revision, name = self.path.split("/", 5)[4:]
                    served.downloads.append(name)
                    served.revisions.add(revision)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    use_endpoint(monkeypatch, served.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    yield served
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def here(workspace: Path) -> Path:
    """The workspace without a base model, as the working directory."""
    shutil.rmtree(workspace / "models")
    return workspace


@pytest.fixture
def source(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A typical model folder: a small Qwen2 with its tokenizer."""
    folder = tmp_path_factory.mktemp("source") / "qwen"
    shutil.copytree(tiny_base, folder)
    (folder / "base.json").unlink()
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A typical Llama folder: byte-fallback BPE with ▁, a BOS before every text, separate files
    for special tokens and chat template, and two weight shards."""
    folder = tmp_path / "llama"
    folder.mkdir()
    pieces = ["▁", "H", "e", "l", "o", "w", "r", "d", "i", "t", "a", "n", ",", "'", "s", "u"]
    merges = [("l", "l"), ("H", "e"), ("He", "ll"), ("Hell", "o"), ("▁", "Hello"), ("▁", "w")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    tokens += ["".join(merge) for merge in merges]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token, "special": True, **special}
            for number, token in enumerate(tokens[:3])
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first",
            "split": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "ByteFallback"},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    write(folder / "tokenizer.json", tokenizer)
    write(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "legacy": False})
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    write(folder / "special_tokens_map.json", named)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    shape: dict[str, Any] = SHAPE | {"vocab_size": len(tokens), "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape))
    of_class = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    write(folder / "config.json", of_class | shape)
    write(folder / "generation_config.json", {"eos_token_id": 2})
    names = sorted(model.state_dict())
    places = {name: f"model-0000{1 + at % 2}-of-00002.safetensors" for at, name in enumerate(names)}
    for shard in {*places.values()}:
        tensors = {name: model.state_dict()[name] for name in names if places[name] == shard}
        save_file(tensors, folder / shard, {"format": "pt"})
    index = {"metadata": {"total_size": model.num_parameters() * 4}, "weight_map": places}
    write(folder / "model.safetensors.index.json", index)
    return folder


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def refused() -> str:
    """Run fetch, which must refuse and leave nothing behind; return its one-line message."""
    with pytest.raises(Fault) as caught:
        fetch.main()
    assert list(Path("models").iterdir()) == []
    sentence = str(caught.value)
    assert sentence.startswith("params.yaml: base.name ")
    assert any(word in sentence for word in (", expected ", "; "))
    assert "\n" not in sentence
    return sentence


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_local_folder_is_copied_with_unchanged_weights(source: Path, set_params: SetParams) -> None:
    original = digests(source)
    set_params("base", name=str(source))
    fetch.main()
    base = read_json(fetch.BASE / "base.json")
    assert digest(fetch.BASE / "model.safetensors") == original["model.safetensors"]
    assert (base["kind"], base["name"]) == ("local", str(source))
    assert base["source"] == original
    assert base["files"] == {
        name: value for name, value in digests(fetch.BASE).items() if name != "base.json"
    }
    assert digests(source) == original


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# Model\n", {"license": "mit"}),
        ("---\nlicense: [mit, x]\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\n- license\n---\n", {}),
        ("# Model\n", {}),
        ("\udcff", {}),
        (None, {}),
    ],
)
def test_licence_is_read_from_the_card(
    tmp_path: Path, card: str | None, found: dict[str, str]
) -> None:
    if card is not None:
        (tmp_path / "README.md").write_bytes(card.encode(errors="surrogateescape"))
    assert fetch.license_in(tmp_path) == found


def test_merged_model_of_an_export_has_the_licence_of_the_card_above(
    here: Path, source: Path, set_params: SetParams
) -> None:
    export = here / "mine"
    shutil.copytree(source, export / "merged")
    (export / "README.md").write_text("---\nlicense: mit\n---\n")
    (export / "digests.json").touch()
    set_params("base", name="mine/merged")
    fetch.main()
    assert "license" not in read_json(fetch.BASE / "base.json")  # the card of something else
    (export / "adapter_config.json").touch()
    fetch.main()
    assert read_json(fetch.BASE / "base.json")["license"] == {"license": "mit"}
    (export / "merged" / "README.md").write_text("---\nlicense: bsd\n---\n")
    fetch.main()
    assert read_json(fetch.BASE / "base.json")["license"] == {"license": "bsd"}


def test_copied_files_have_default_modes(here: Path, source: Path, set_params: SetParams) -> None:
    for path in source.iterdir():
        path.chmod(0o600)
    set_params("base", name=str(source))
    fetch.main()
    (here / "plain").touch()
    usual = (here / "plain").stat().st_mode
    assert {path.stat().st_mode for path in fetch.BASE.iterdir()} == {usual}
    assert usual & stat.S_IRUSR


def test_second_run_writes_the_same_bytes(llama: Path, set_params: SetParams) -> None:
    set_params("base", name=str(llama))
    fetch.main()
    first = digests(fetch.BASE)
    fetch.main()
    assert digests(fetch.BASE) == first


def test_folder_may_be_relative_or_start_with_a_tilde(
    here: Path, source: Path, set_params: SetParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(source.parent))
    set_params("base", name="~/qwen")
    fetch.main()
    shutil.copytree(source, here / "mine")
    set_params("base", name="./mine")
    fetch.main()
    assert read_json(fetch.BASE / "base.json")["name"] == "./mine"


def test_shards_are_copied_with_their_index_and_nothing_else(
    llama: Path, set_params: SetParams
) -> None:
    shards = {path.name for path in llama.glob("model-*")}
    for name in ("consolidated.safetensors", "pytorch_model.bin", "README.md", "optimizer.pt"):
        (llama / name).write_bytes(b"large")
    (llama / "onnx").mkdir()
    (llama / "onnx" / "model.safetensors").write_bytes(b"large")
    set_params("base", name=str(llama))
    fetch.main()
    kept = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names(fetch.BASE) == shards | kept | {"model.safetensors.index.json", "base.json"}
    assert all(digest(fetch.BASE / name) == digest(llama / name) for name in shards)


@pytest.mark.parametrize("style", ["source", "llama"])
def test_every_loader_gives_the_ids_of_the_source(
    style: str,
    set_params: SetParams,
    request: pytest.FixtureRequest,
) -> None:
    from transformers import AutoTokenizer

    folder = request.getfixturevalue(style)
    expected = AutoTokenizer.from_pretrained(folder)(TEXTS)["input_ids"]
    set_params("base", name=str(folder))
    fetch.main()
    saved = Tokenizer.from_file(str(fetch.BASE / "tokenizer.json"))
    loaded = AutoTokenizer.from_pretrained(fetch.BASE)
    assert [encoding.ids for encoding in saved.encode_batch(TEXTS)] == expected
    assert loaded(TEXTS)["input_ids"] == expected
    assert len(set(map(tuple, expected))) == len(TEXTS)


def test_bos_added_by_the_source_is_kept(llama: Path, set_params: SetParams) -> None:
    set_params("base", name=str(llama))
    fetch.main()
    saved = Tokenizer.from_file(str(fetch.BASE / "tokenizer.json"))
    assert saved.encode("Hello").tokens == ["<s>", "▁Hello"]


@pytest.mark.parametrize("style", ["source", "llama"])
def test_class_special_tokens_and_chat_template_need_no_extra_file(
    style: str, here: Path, set_params: SetParams, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoTokenizer

    folder = request.getfixturevalue(style)
    before = AutoTokenizer.from_pretrained(folder)
    set_params("base", name=str(folder))
    fetch.main()
    alone = here / "alone"
    alone.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(fetch.BASE / name, alone)
    for place in (fetch.BASE, alone):
        after = AutoTokenizer.from_pretrained(place)
        assert after.special_tokens_map == before.special_tokens_map
        assert after.chat_template == before.chat_template
        assert after(TEXTS)["input_ids"] == before(TEXTS)["input_ids"]
    assert type(AutoTokenizer.from_pretrained(fetch.BASE)) is type(before)
    assert read_json(fetch.BASE / "tokenizer_config.json")["chat_template"]


def test_truncation_and_padding_of_the_source_are_dropped(
    source: Path, set_params: SetParams
) -> None:
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(source / "tokenizer.json"))
    set_params("base", name=str(source))
    fetch.main()
    saved = Tokenizer.from_file(str(fetch.BASE / "tokenizer.json"))
    assert saved.truncation is None
    assert saved.padding is None


def test_default_of_several_chat_templates_is_kept(source: Path, set_params: SetParams) -> None:
    config = read_json(source / "tokenizer_config.json")
    config["chat_template"] = [
        {"name": "tools", "template": "tools"},
        {"name": "default", "template": "plain"},
    ]
    write(source / "tokenizer_config.json", config)
    set_params("base", name=str(source))
    fetch.main()
    assert read_json(fetch.BASE / "tokenizer_config.json")["chat_template"] == "plain"


def test_custom_code_is_neither_copied_nor_run(
    here: Path, source: Path, set_params: SetParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = here / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr("sys.path", [*sys.path, str(modules)])
    (source / "own.py").write_text(
        "from pathlib import Path\nfrom transformers import PreTrainedTokenizerFast\n"
        f"Path({str(here / 'ran')!r}).touch()\n"
        "class Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    config = read_json(source / "tokenizer_config.json")
    own = {"auto_map": {"AutoTokenizer": [None, "own.Own"]}, "tokenizer_class": "Own"}
    write(source / "tokenizer_config.json", config | own)
    set_params("base", name=str(source))
    fetch.main()
    assert not (fetch.BASE / "own.py").exists()
    assert not (here / "ran").exists()
    assert "auto_map" not in read_json(fetch.BASE / "tokenizer_config.json")


def of(kind: str, name: str, **more: Any) -> dict[str, Any]:
    return {"model_type": kind, "architectures": [name], **more}


def quantized(**recipe: Any) -> dict[str, Any]:
    return of("qwen2", "Qwen2ForCausalLM", quantization_config=recipe)


# Models that config.json alone rules out: its content, and words of the message.
CONFIGS: dict[str, tuple[Any, str]] = {
    "encoder": (of("bert", "BertForMaskedLM"), "is a BertForMaskedLM, expected"),
    "encoder with a causal head": (
        of("bert", "BertLMHeadModel"),
        "cannot be used: BertForSequenceClassification has no linear layer `score`, expected",
    ),
    "encoder-decoder": (of("t5", "T5ForConditionalGeneration"), "is a T5ForConditionalGeneration"),
    "vision": (of("qwen2_vl", "Qwen2VLForConditionalGeneration"), "is a Qwen2VLForConditional"),
    "no classifier": (
        of("cohere", "CohereForCausalLM"),
        "is a CohereForCausalLM, for which transformers has no sequence classifier, expected",
    ),
    "no classifier over experts": (of("olmoe", "OlmoeForCausalLM"), "is a OlmoeForCausalLM, for"),
    "custom code": (
        {"model_type": "novel", "auto_map": {"AutoModel": "x.Y"}},
        "is a novel whose own code would have to run, expected",
    ),
    "empty": ({}, "is a None, expected"),
    "a list": ([1], "broken config.json, a list"),
    "GPTQ": (quantized(quant_method="gptq", bits=4), "is already quantized (gptq), expected"),
    "AWQ": (quantized(quant_method="awq"), "is already quantized (awq), expected"),
    "FP8": (quantized(quant_method="fp8"), "is already quantized (fp8), expected"),
    "bitsandbytes": (
        quantized(quant_method="bitsandbytes", load_in_4bit=True),
        "is already quantized (bitsandbytes), expected",
    ),
    "old bitsandbytes": (
        quantized(load_in_8bit=True),
        "is already quantized (quantization_config), expected",
    ),
    "an empty recipe": (
        of("qwen2", "Qwen2ForCausalLM", quantization_config={}),
        "is already quantized (quantization_config), expected",
    ),
    "MLX": (
        of("qwen2", "Qwen2ForCausalLM", quantization={"bits": 4, "group_size": 64}),
        "is already quantized (quantization), expected",
    ),
    "a pad token without a row": (
        of("llama", "LlamaForCausalLM", vocab_size=300, pad_token_id=300),
        "has a config.json from which transformers cannot build a model (AssertionError: Padding_",
    ),
    "no pad token allowed": (
        of("modernbert-decoder", "ModernBertDecoderForCausalLM"),
        "cannot be used: ModernBertDecoderForSequenceClassification has no linear layer `score`",
    ),
    "compressed tensors": (
        of("qwen2", "Qwen2ForCausalLM", compression_config={"quant_method": "compressed-tensors"}),
        "is already quantized (compressed-tensors), expected",
    ),
    "a quantized text part": (
        of(
            "gemma3",
            "Gemma3ForConditionalGeneration",
            text_config={"quantization_config": {"quant_method": "gptq"}},
        ),
        "is already quantized (gptq), expected",
    ),
    "Gemma 2": (of("gemma2", "Gemma2ForCausalLM"), "cannot be packed: Gemma2Attention uses softc"),
    "GPT-OSS": (
        of("gpt_oss", "GptOssForCausalLM", quantization_config={"quant_method": "mxfp4"}),
        "cannot be packed: GptOssAttention uses s_aux in its attention",
    ),
    "Qwen3.5": (
        of("qwen3_5_text", "Qwen3_5ForCausalLM"),
        "calls attention 8 times in 32 layers, expected once in each; other layers carry state",
    ),
    "Jamba": (of("jamba", "JambaForCausalLM"), "calls attention 4 times in 32 layers, expected"),
    "Falcon": (of("falcon", "FalconForCausalLM"), "does not allow its attention"),
    "BLOOM": (of("bloom", "BloomForCausalLM"), "does not allow its attention"),
    "StableLM": (
        of("stablelm", "StableLmForCausalLM"),
        "cannot be packed: StableLmAttention does not receive the layout of its row",
    ),
    "bidirectional attention": (
        of("gemma3_text", "Gemma3ForCausalLM", use_bidirectional_attention=True),
        "cannot be packed: Gemma3Attention also attends to later tokens, expected",
    ),
    "bidirectional masks": (
        of("qwen2", "Qwen2ForCausalLM", is_causal=False),
        'also attends to later tokens ("is_causal" in its config.json), expected',
    ),
    "a mean of all tokens": (
        of(
            "cohere_compass_text",
            "CohereCompassTextForSequenceClassification",
            pooling="mean",
            id2label={"0": "reward"},
        ),
        "does not read its reward from the last token ('mean' is `pooling` in its config.json)",
    ),
    "attention weights as output": (
        of("llama", "LlamaForCausalLM", output_attentions=True),
        'has "output_attentions": true in its config.json, with which clients of the trained model '
        "get no rewards; set it to false in a local copy of the model and use that",
    ),
    "tuples as output": (
        of("llama", "LlamaForCausalLM", return_dict=False),
        'has "return_dict": false in its config.json, with which clients of the trained model get '
        "no rewards; set it to true in a local copy",
    ),
    "torchscript": (
        of("llama", "LlamaForCausalLM", torchscript=True),
        'has "torchscript": true in its config.json, with which',
    ),
    "attention of another library": (
        of("llama", "LlamaForCausalLM", _attn_implementation="flash_attention_2"),
        'has "_attn_implementation": "flash_attention_2" in its config.json, which not every '
        "machine has; set it to null in a local copy",
    ),
    "a mask that the code needs": (
        of("axk2", "AXK2ForCausalLM"),
        "cannot be packed: AXK2ForSequenceClassification fails on a row of tokens without a mask (",
    ),
    "no vocabulary": (
        of("canine", "CanineForSequenceClassification", id2label={"0": "reward"}),
        "cannot be used: CanineForSequenceClassification has no linear layer `score`",
    ),
    "impossible shape": (
        of("llama", "LlamaForCausalLM", num_attention_heads=7),
        "has a config.json from which transformers cannot build a model (",
    ),
    "Granite without heads": (
        of("granite", "GraniteForCausalLM", num_attention_heads=0),
        "has a config.json that cannot be converted (ZeroDivisionError: ",
    ),
    "Gemma 3 without its text part": (
        {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": None},
        "has a config.json that cannot be converted (TypeError: ",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_anything_but_a_decoder_language_model_is_refused(
    case: str, source: Path, set_params: SetParams
) -> None:
    config, found = CONFIGS[case]
    write(source / "config.json", config)
    set_params("base", name=str(source))
    assert found in refused()


def test_reason_names_state_only_if_layers_without_attention_may_carry_it() -> None:
    assert str(problem_with({"model_type": "diffllama"})).endswith("expected once in each")


def spoil(path: Path) -> None:
    path.write_text("{")


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def adapter(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    write(folder / "adapter_config.json", {"peft_type": "LORA"})


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickle only": (pickle_only, "has only pytorch_model.bin"),
    "an adapter": (adapter, "is an adapter, expected a whole model, such as merged/ of an export"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
    "git-lfs pointer": (pointer, "has a broken model.safetensors"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "broken config": (
        lambda folder: spoil(folder / "config.json"),
        "has a broken config.json",
    ),
    "no tokenizer": (no_tokenizer, "tokenizer"),
    "no vocabulary": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        "has no vocabulary for its tokenizer",
    ),
    "broken tokenizer": (
        lambda folder: spoil(folder / "tokenizer.json"),
        "has no fast tokenizer that loads",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_incomplete_folder_is_refused(case: str, source: Path, set_params: SetParams) -> None:
    change, found = BROKEN[case]
    change(source)
    set_params("base", name=str(source))
    assert found in refused()


Tensors = dict[str, torch.Tensor]


def without(name: str, tensors: Tensors) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if name not in key}


# Weights that do not belong to config.json: a change of them, and words of the message.
WEIGHTS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "one missing": (
        lambda tensors: without("layers.0.mlp.up_proj", tensors),
        "lacks model.layers.0.mlp.up_proj.weight among its weights, expected all that Qwen2For",
    ),
    "with a prefix": (
        lambda tensors: {f"_orig_mod.{name}": each for name, each in tensors.items()},
        "lacks model.embed_tokens.weight, model.layers.0.input_layernorm.weight and ",
    ),
    "of another shape": (
        lambda tensors: tensors | {"model.norm.weight": torch.ones(7)},
        "has model.norm.weight of shape [7], expected [",
    ),
    "without their scales": (
        lambda tensors: (
            tensors | {"model.norm.weight": tensors["model.norm.weight"].to(torch.float8_e4m3fn)}
        ),
        "is already quantized (model.norm.weight is F8_E4M3), expected",
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_of_another_model_are_refused(
    case: str, source: Path, set_params: SetParams
) -> None:
    change, found = WEIGHTS[case]
    save_file(
        change(load_file(source / fetch.WEIGHTS)),
        source / fetch.WEIGHTS,
        {"format": "pt"},
    )
    set_params("base", name=str(source))
    assert found in refused()
    assert not fetch.BASE.exists()


def test_missing_part_of_an_expert_is_refused(
    tmp_path: Path, source: Path, set_params: SetParams
) -> None:
    save_family("Mixtral", tmp_path / "mixtral")
    tensors = load_file(tmp_path / "mixtral" / fetch.WEIGHTS)
    save_file(without("layers.1.block_sparse_moe.experts.2.w1", tensors), source / fetch.WEIGHTS)
    shutil.copy(tmp_path / "mixtral" / "config.json", source)
    set_params("base", name=str(source))
    assert "has weights that transformers cannot load (" in refused()


def test_implementation_of_experts_for_a_model_without_them_is_refused(
    source: Path, set_params: SetParams
) -> None:
    config = read_json(source / "config.json")
    write(source / "config.json", config | {"experts_implementation": "grouped_mm"})
    set_params("base", name=str(source))
    assert (
        "has a config.json with which transformers cannot load it (Qwen2ForSequenceClassification "
        "does not support setting experts implementation.), expected one that suits the model"
    ) in refused()
    assert not fetch.BASE.exists()


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json"])
def test_file_of_a_quantization_is_seen_before_the_weights(
    name: str, source: Path, hub: Hub, set_params: SetParams
) -> None:
    write(source / name, {"bits": 4})
    hub.add("org/model", source)
    set_params("base", name="org/model")
    assert f"is already quantized ({name}), expected the unquantized model" in refused()
    assert fetch.WEIGHTS not in hub.downloads


def test_weights_that_are_not_used_are_named(
    source: Path, set_params: SetParams, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as the head of a value model, or layers beyond those of config.json."""
    tensors = load_file(source / fetch.WEIGHTS) | {"lm_head.weight": torch.ones(1)}
    save_file(tensors, source / fetch.WEIGHTS, {"format": "pt"})
    set_params("base", name=str(source))
    fetch.main()
    assert "unused" not in capsys.readouterr().out
    tensors |= {"v_head.summary.weight": torch.ones(1)}
    save_file(tensors, source / fetch.WEIGHTS, {"format": "pt"})
    fetch.main()
    assert capsys.readouterr().out.startswith(
        "unused     1 tensor that a Qwen2ForSequenceClassification does not have, such as v_head."
    )


def test_missing_shard_and_broken_index_are_named(llama: Path, set_params: SetParams) -> None:
    set_params("base", name=str(llama))
    (llama / "model-00002-of-00002.safetensors").unlink()
    assert "lacks model-00002-of-00002.safetensors" in refused()
    for content in ("{", "[]", '{"weight_map": []}'):
        (llama / "model.safetensors.index.json").write_text(content)
        assert "has a broken model.safetensors.index.json" in refused()
    write(llama / "model.safetensors.index.json", {"weight_map": {"a": 1, "b": None}})
    assert "lacks 1, None, expected all shards in its model.safetensors.index.json" in refused()


@pytest.mark.parametrize("found", [5, "Qwen2ForCausalLM", [["Qwen2ForCausalLM"]]])
def test_architectures_that_are_no_names_are_refused(
    found: Any, source: Path, set_params: SetParams
) -> None:
    write(source / "config.json", read_json(source / "config.json") | {"architectures": found})
    set_params("base", name=str(source))
    assert 'has a wrong "architectures" in its config.json, expected a list of names' in refused()


def test_folder_that_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """root may read any folder, so the error is a fake."""

    def refuse(_: Path) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(Fault, match=r"cannot be read: Permission denied; expected the folder of a"):
        fetch.local_folder(fetch.Base(str(tmp_path), "main", 0))


def test_shard_outside_the_folder_is_refused(llama: Path, set_params: SetParams) -> None:
    (llama.parent / "outside.safetensors").write_bytes(b"")
    write(llama / "model.safetensors.index.json", {"weight_map": {"w": "../outside.safetensors"}})
    set_params("base", name=str(llama))
    assert "lacks ../outside.safetensors" in refused()


def test_hub_model_is_recorded_with_the_commit_of_its_revision(
    source: Path, llama: Path, hub: Hub, set_params: SetParams
) -> None:
    (source / "README.md").write_text(f"---\n{json.dumps(CARD)}\n---\n")
    repository = hub.add("org/model", source)
    repository.commits[SIDE] = llama
    repository.branches |= {"pr/1": SIDE, "pr%2F1": SIDE, SIDE: SIDE}
    set_params("base", name="org/model")
    fetch.main()
    base = read_json(fetch.BASE / "base.json")
    assert (base["kind"], base["name"], base["revision"]) == ("hub", "org/model", MAIN)
    assert base["license"] == LICENSE
    assert digest(fetch.BASE / "model.safetensors") == digest(source / "model.safetensors")
    set_params("base", revision="pr/1")
    fetch.main()
    assert read_json(fetch.BASE / "base.json")["revision"] == SIDE
    assert hub.revisions == {MAIN, SIDE}  # a branch that moves meanwhile cannot mix two commits
    assert read_json(fetch.BASE / "config.json")["model_type"] == "llama"


def test_only_needed_files_are_downloaded(llama: Path, hub: Hub, set_params: SetParams) -> None:
    (llama / "README.md").write_text("---\nlicense: mit\n---\n")
    needed = names(llama)
    for name in ("consolidated.safetensors", "pytorch_model.bin", "own.py", "x.gguf"):
        (llama / name).write_bytes(b"large")
    (llama / "onnx").mkdir()
    (llama / "onnx" / "model.safetensors").write_bytes(b"large")
    write(llama / "trainer_state.json", {})
    hub.add("org/model", llama)
    set_params("base", name="org/model")
    fetch.main()
    assert sorted(hub.downloads) == sorted(needed)


def test_extra_files_in_the_cache_are_not_copied(
    here: Path, source: Path, hub: Hub, set_params: SetParams
) -> None:
    hub.add("org/model", source)
    set_params("base", name="org/model")
    fetch.main()
    first = digests(fetch.BASE)
    snapshot = next((here / "cache").glob("models--*/snapshots/*"))
    (snapshot / "onnx").mkdir()
    (snapshot / "pytorch_model.bin").touch()
    fetch.main()
    assert digests(fetch.BASE) == first


def test_cached_model_needs_no_hub(
    source: Path,
    hub: Hub,
    set_params: SetParams,
    closed_address: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.add("org/model", source)
    set_params("base", name="org/model", revision=MAIN)
    fetch.main()
    first = digests(fetch.BASE)
    use_endpoint(monkeypatch, closed_address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fetch.main()
    assert digests(fetch.BASE) == first
    shutil.rmtree(fetch.BASE)
    message = "is neither a local folder nor in the Hub's cache, and HF_HUB_OFFLINE is set"
    for name in ("org/other", "no/such/id"):
        set_params("base", name=name)
        assert message in refused()


@pytest.mark.parametrize("case", ["encoder", "GPTQ", "Gemma 2", "a quantized text part"])
def test_weights_of_unusable_models_are_not_downloaded(
    case: str, source: Path, hub: Hub, set_params: SetParams
) -> None:
    config, found = CONFIGS[case]
    write(source / "config.json", config)
    hub.add("org/model", source)
    set_params("base", name="org/model")
    assert found in refused()
    assert "config.json" in hub.downloads
    assert "model.safetensors" not in hub.downloads


def test_cached_models_are_refused_for_the_same_reasons(
    here: Path, source: Path, hub: Hub, set_params: SetParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/model", source)
    set_params("base", name="org/model", revision=MAIN)
    fetch.main()
    shutil.rmtree(fetch.BASE)
    config, found = CONFIGS["FP8"]
    write(next((here / "cache").glob("models--*/snapshots/*/config.json")), config)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert found in refused()


def test_pickles_on_the_hub_are_refused_before_any_download(
    source: Path, hub: Hub, set_params: SetParams
) -> None:
    pickle_only(source)
    hub.add("org/model", source)
    set_params("base", name="org/model")
    assert "has only pytorch_model.bin" in refused()
    assert hub.downloads == []


def test_unknown_model_and_unknown_revision_have_different_messages(
    source: Path, hub: Hub, set_params: SetParams
) -> None:
    set_params("base", name="org/nothing")
    assert "org/nothing is neither a local folder nor a model at http://127.0.0.1" in refused()
    hub.add("org/model", source)
    set_params("base", name="org/model", revision="v9")
    assert "has no revision v9" in refused()


@pytest.mark.parametrize("option", ["gated", "metadata_gated"])
def test_message_for_a_gated_model_says_what_to_do(
    option: str, source: Path, hub: Hub, set_params: SetParams
) -> None:
    hub.add("org/model", source, **{option: True})
    set_params("base", name="org/model")
    sentence = refused()
    assert "is gated" in sentence
    assert "HF_TOKEN" in sentence


@pytest.mark.parametrize("name", ["/no/such/folder", "a/b/c", "two words", "~nobodyatall/model"])
def test_name_that_is_neither_id_nor_folder_is_refused_without_a_request(
    name: str, hub: Hub, set_params: SetParams
) -> None:
    set_params("base", name=name)
    assert f"{name} is neither a local folder nor a valid Hub id" in refused()
    assert hub.tokens == set()


@pytest.mark.parametrize("name", ["models/base", "./models/base/", "models/base/mine"])
def test_folder_that_fetch_writes_is_refused_also_if_dvc_has_removed_it(
    name: str, hub: Hub, set_params: SetParams
) -> None:
    set_params("base", name=name)
    assert "is in models/base, where this stage puts the base; expected another" in refused()
    assert hub.tokens == set()


def test_folder_that_is_missing_only_in_the_copy_of_an_experiment_is_named(
    here: Path, hub: Hub, set_params: SetParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dvc exp run --temp` and the queue copy only what git knows."""
    set_params("base", name="models/mine")
    (here / "models" / "mine").mkdir(parents=True)
    copy = here / ".dvc" / "tmp" / "exps" / "standalone" / "tmp1"
    (copy / "models").mkdir(parents=True)
    shutil.copy("params.yaml", copy)
    monkeypatch.setenv("DVC_ROOT", str(here))
    monkeypatch.chdir(copy)
    assert refused() == (
        "params.yaml: base.name models/mine is not in the copy of the project in which DVC runs "
        "this experiment, because git does not know it; add -C models/mine to the command, or give "
        "its absolute path"
    )
    assert hub.tokens == set()


def test_response_that_is_not_from_a_hub_is_refused(hub: Hub, set_params: SetParams) -> None:
    hub.page = b"<html>Please log in to the wireless network</html>"
    set_params("base", name="org/model")
    assert "does not answer like a Hub" in refused()


@pytest.mark.usefixtures("hub")
def test_unreachable_hub_is_reported_within_seconds(
    closed_address: str, set_params: SetParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_endpoint(monkeypatch, closed_address)
    set_params("base", name="org/model")
    start = time.monotonic()
    assert f"{closed_address} could not be reached" in refused()
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://user:p@ss@127.0.0.1:9/hf", "http://127.0.0.1:9/hf"),
        ("token@127.0.0.1:9", "127.0.0.1:9"),
        ("http://127.0.0.1:9", "http://127.0.0.1:9"),
        ("http://127.0.0.1:9/hf@main", "http://127.0.0.1:9/hf@main"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_password_of_a_mirror_is_in_no_message(
    set_params: SetParams, monkeypatch: pytest.MonkeyPatch, address: str, shown: str
) -> None:
    """Neither in those of the stage nor in those that huggingface_hub logs at each retry."""
    use_endpoint(monkeypatch, address)
    set_params("base", name="org/model")
    assert f"and {shown} could not be reached" in refused()
    [handler, *_] = logging.getLogger("huggingface_hub").handlers
    logged = logging.makeLogRecord({"msg": "Error 503 at %s/org", "args": (address,)})
    assert handler.filter(logged)
    assert logged.getMessage() == f"Error 503 at {shown}/org"


@pytest.mark.usefixtures("hub")
def test_hub_that_never_answers_times_out(
    set_params: SetParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        use_endpoint(monkeypatch, f"http://127.0.0.1:{port}")
        monkeypatch.setattr(fetch, "SECONDS", 0.2)
        set_params("base", name="org/model")
        assert "could not be reached (ReadTimeout)" in refused()


def run_fetch(here: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    """`python -m stages.fetch` as DVC runs it, with HF_ENDPOINT, a token and its own cache."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(here / "hf"),
        "HF_TOKEN": SECRET,
        "NO_PROXY": "127.0.0.1",
        "ALL_PROXY": "http://127.0.0.1:9",  # any outside address fails here
    }
    command = [sys.executable, "-m", "stages.fetch"]
    return subprocess.run(
        command, cwd=here, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_mirror_gets_the_token_and_no_output_contains_it(
    here: Path, source: Path, hub: Hub, set_params: SetParams
) -> None:
    hub.add("org/model", source)
    set_params("base", name="org/model")
    done = run_fetch(here, hub.endpoint)
    assert done.returncode == 0, done.stderr
    assert hub.tokens == {f"Bearer {SECRET}"}
    assert SECRET not in done.stdout + done.stderr
    assert all(SECRET.encode() not in path.read_bytes() for path in fetch.BASE.iterdir())
    assert MAIN in done.stdout


def test_stage_exits_with_one_sentence_and_status_1(
    here: Path, closed_address: str, set_params: SetParams
) -> None:
    set_params("base", name="org/model")
    done = run_fetch(here, closed_address.replace("//", f"//user:{SECRET}@"))
    assert done.returncode == 1
    start = f"params.yaml: base.name org/model is not a local folder, and {closed_address} could"
    assert done.stderr.startswith(start)
    assert done.stderr.count("\n") == 1
    assert list((here / "models").iterdir()) == []


def test_changed_local_base_is_noticed_before_training(llama: Path, set_params: SetParams) -> None:
    from stages.train import require_same_source

    set_params("base", name=str(llama))
    fetch.main()
    require_same_source()
    (llama / "notes.txt").write_text("no part of the model")
    require_same_source()
    shard = llama / "model-00002-of-00002.safetensors"
    changed = {name: each + 1 for name, each in load_file(shard).items()}
    save_file(changed, shard, {"format": "pt"})
    (llama / "special_tokens_map.json").unlink()
    with pytest.raises(Fault, match=r"\(model-00002-of-00002.safetensors, special_tokens_map.json"):
        require_same_source()


def test_missing_local_source_does_not_stop_training(
    source: Path, set_params: SetParams, capsys: pytest.CaptureFixture[str]
) -> None:
    from stages.train import require_same_source

    set_params("base", name=str(source))
    fetch.main()
    shutil.rmtree(source)
    require_same_source()
    assert "no longer exists" in capsys.readouterr().out


def test_tokenizer_that_its_file_does_not_reproduce_is_refused(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_base, tmp_path / "copy"))
    monkeypatch.setattr(fetch, "ids_of_file", lambda _: [[1], [2], [3]])
    with pytest.raises(Fault, match="has a tokenizer that gives different ids after it is saved"):
        fetch.normalize_tokenizer(fetch.Base("mine", "main", 0), folder)
