"""Put the base model into models/base: from the Hub, from a local folder, or the embedded one.

    python -m stages.fetch

Writes the weights (safetensors, unchanged), the configuration, the tokenizer as transformers builds
it (one tokenizer.json and one tokenizer_config.json, whatever the source has), and base.json with
the name, the resolved revision, the licence if it is known, and the SHA-256 of every file. Weights
come last, after everything else has been checked. A few architectures are converted to an
equivalent one.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from logging import LogRecord, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from reward import params
from reward.model import embedded
from reward.outputs import (
    copy_file,
    digest,
    digests,
    read_json,
    whole_folder,
    with_bar,
    write_json,
    write_text,
    writing,
)
from reward.params import Seed, Text
from reward.process import Fault, counted, named, one_line
from reward.stage import copied_from, reads, run_stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from reward.model.converting import Conversion

BASE = Path("models/base")
EXPORT = BASE.with_name("export")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
CONFIGS = ("config.json", "generation_config.json")
TOKENIZER = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "*.model",
    "*.tiktoken",
)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")
# Texts on which a tokenizer must give the same ids after it is saved.
PROBES = [
    "问:What's 12 + 30?\n\n答: It's 42, 四十二。 <|endoftext|>",
    "  Two spaces,\ttabs\r\n\n\n and 1234567 CAPITALS </s> <|im_end|>",
    "e\u0301 é 👩‍👩‍👧 𝔘nicode \u00a0 ﬁn",
]
# How long to wait for an answer from the Hub.
SECONDS = 7


@dataclass(frozen=True)
class Base:
    """The group `base` of params.yaml, which describes each key."""

    name: Text
    revision: Text
    seed: Seed

    def fault(self, found: str) -> Fault:
        """A Fault about the model that base.name names."""
        return Fault(f"params.yaml: base.name {self.name} {found}")


@dataclass(frozen=True)
class Source:
    """Where a base comes from: the names of its files, and a function from name to local path.

    `license` is what the model card says about the licence, with the keys of the Hub.
    """

    kind: str
    revision: str
    names: Sequence[str]
    path: Callable[[str], Path]
    license: dict[str, str] = field(default_factory=dict)

    def matching(self, patterns: Sequence[str]) -> list[str]:
        """Names of the files directly in the folder that match any of the patterns, sorted."""
        return sorted(
            name
            for name in self.names
            if "/" not in name and any(fnmatchcase(name, pattern) for pattern in patterns)
        )


def main() -> None:
    base = params.load("base", Base)
    with whole_folder(BASE) as folder:
        if base.name == embedded.NAME:
            reads(embedded.CORPUS)
            embedded.build(folder, base.seed)
            normalize_tokenizer(base, folder)
            origin: dict[str, Any] = {
                "kind": "embedded",
                "revision": f"seed {base.seed}",
                "license": {"license": "apache-2.0"},
            }
        else:
            origin = copy(base, local_folder(base) or hub_repository(base), folder)
        files = digests(folder)
        write_json(folder / "base.json", {"name": base.name, "files": files, **origin})
    size = sum(file.stat().st_size for file in BASE.iterdir()) / 1e6
    print(f"base       {base.name} ({origin['revision']}), {size:.0f} MB")
    print(f"fetched    {BASE}")


def local_folder(base: Base) -> Source | None:
    """The local folder whose path is base.name, if it exists.

    Raises a Fault for models/base itself, for the exported folder, which is made from it, and for a
    folder that the project has, but not its copy in which DVC runs an experiment.
    """
    try:
        folder = Path(base.name).expanduser()
    except RuntimeError:  # the home of an unknown user
        return None
    if folder.resolve().is_relative_to(BASE.resolve()):
        raise base.fault(f"is in {BASE}, where this stage puts the base; expected another folder")
    if folder.resolve().is_relative_to(EXPORT.resolve()):
        mine = EXPORT.with_name("mine")
        raise base.fault(
            f"is in {EXPORT}, which the pipeline makes from its base; expected a copy of it "
            f"elsewhere: dvc get . {EXPORT} --rev main -o {mine}, and then base.name={mine}/merged"
        )
    if not folder.is_dir():
        if (project := copied_from()) and (project / folder).is_dir():
            raise base.fault(
                "is not in the copy of the project in which DVC runs this experiment, because git "
                f"does not know it; add -C {base.name} to the command, or give its absolute path"
            )
        return None
    try:
        names = [path.name for path in folder.iterdir() if path.is_file()]
    except OSError as error:
        raise base.fault(
            f"cannot be read: {error.strerror}; expected the folder of a model"
        ) from None
    found = license_in(with_card(folder))
    return Source("local", "local folder", names, lambda name: folder / name, found)


def with_card(folder: Path) -> Path:
    """The folder with a local model's card: one up for the merged model of an export."""
    export = folder.resolve().parent
    is_export = all((export / name).is_file() for name in ("digests.json", ADAPTER_CONFIG))
    return export if is_export and not (folder / "README.md").exists() else folder


def hub_repository(base: Base) -> Source:
    """The model on the Hub, or on the mirror in HF_ENDPOINT, at the commit of base.revision."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return cached_repository(base)
    api = HfApi()
    endpoint = without_password(api.endpoint)
    hide_password(api.endpoint)
    with hub_faults(base, endpoint):
        info = api.model_info(base.name, revision=base.revision, timeout=SECONDS)
    commit = info.sha
    if commit is None:
        raise base.fault(f"has no commit at {endpoint}, expected a Hub that reports one")

    def download(name: str) -> Path:
        with hub_faults(base, endpoint), writing(Path(constants.HF_HUB_CACHE)):
            return Path(api.hf_hub_download(base.name, name, revision=commit))

    names = [file.rfilename for file in info.siblings or []]
    # Read from the card itself, so that the card is in the cache for offline use.
    found = license_in(download("README.md").parent) if "README.md" in names else {}
    return Source("hub", commit, names, download, found)


def without_password(address: str) -> str:
    """An address without the user and the password that it may contain."""
    return re.sub(r"^(\w+://)?[^/]*@", r"\1", address)


def hide_password(address: str) -> None:
    """Leave the user and the password of an address out of what huggingface_hub logs."""

    def hide(record: LogRecord) -> bool:
        record.msg = record.getMessage().replace(address, without_password(address))
        record.args = ()
        return True

    for handler in getLogger("huggingface_hub").handlers:
        handler.addFilter(hide)


def cached_repository(base: Base) -> Source:
    """The model in the local Hub cache, which is used if HF_HUB_OFFLINE is set."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(base.name, revision=base.revision, local_files_only=True)
    except (HFValidationError, LocalEntryNotFoundError):
        raise base.fault(
            f"at {base.revision} is neither a local folder nor in the Hub's cache, and "
            "HF_HUB_OFFLINE is set; unset it to download the model"
        ) from None
    folder = Path(found)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return Source("hub", folder.name, names, lambda name: folder / name, license_in(folder))


def license_in(folder: Path) -> dict[str, str]:
    """The licence in the card of a model; empty without a readable card."""
    from huggingface_hub import metadata_load

    try:
        card = metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    # A licence that the Hub does not know has a name and a link.
    found = {name: card.get(name) for name in ("license", "license_name", "license_link")}
    return {name: value for name, value in found.items() if isinstance(value, str)}


@contextmanager
def hub_faults(base: Base, endpoint: str) -> Iterator[None]:
    """Turn an error of huggingface_hub about a model that cannot be downloaded into a Fault."""
    from huggingface_hub import errors

    # The base class of the errors of the HTTP library, which is httpx or httpx2, depending on the
    # version of huggingface_hub.
    unreachable = errors.HTTPError  # type: ignore[attr-defined]
    try:
        yield
    except errors.HFValidationError:
        raise base.fault(
            "is neither a local folder nor a valid Hub id, expected one of these or "
            f"{embedded.NAME}"
        ) from None
    except errors.GatedRepoError:
        raise base.fault(
            f"is gated; accept its terms on its page at {endpoint} and set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise base.fault(
            f"has no revision {base.revision} at {endpoint}, expected one of its "
            "branches, tags or commits"
        ) from None
    except errors.RepositoryNotFoundError:
        raise base.fault(
            f"is neither a local folder nor a model at {endpoint} that you can read, expected a "
            f"Hub id, a local folder, or {embedded.NAME}; a private model needs HF_TOKEN"
        ) from None
    except errors.HfHubHTTPError as error:
        status = f"{error.response.status_code} {error.server_message or ''}".strip()
        raise base.fault(
            f"is not a local folder, and {endpoint} answered {status}, expected the model's files"
        ) from None
    except json.JSONDecodeError:
        raise base.fault(
            f"is not a local folder, and {endpoint} does not answer like a Hub, "
            "expected the Hub or a mirror of it in HF_ENDPOINT"
        ) from None
    except (
        unreachable,
        errors.LocalEntryNotFoundError,
        errors.FileMetadataError,
        ConnectionError,
    ) as error:
        raise base.fault(
            f"is not a local folder, and {endpoint} could not be reached ({type(error).__name__}), "
            "expected a connection, or a mirror in HF_ENDPOINT"
        ) from None


def copy(base: Base, source: Source, folder: Path) -> dict[str, Any]:
    """Copy only what a model needs. Returns the entries of base.json about its origin."""
    from reward.model.converting import conversion_of

    require_weights(base, source)
    for name in source.matching(CONFIGS + TOKENIZER):
        copy_file(source.path(name), folder / name)
    original = digests(folder)
    config = read_config(base, folder)
    try:
        conversion = conversion_of(config)
    except Exception as error:  # because config.json may hold anything
        raise base.fault(
            f"has a config.json that cannot be converted ({named(error)}), expected one for the "
            "installed version of transformers"
        ) from None
    require_suitable(base, config, conversion, source)
    normalize_tokenizer(base, folder)
    origin: dict[str, Any] = {"kind": source.kind, "revision": source.revision}
    if source.license:
        origin["license"] = source.license
    if conversion:
        weights = convert_weights(base, source, folder, conversion)
        write_json(folder / "config.json", conversion.config)
        origin["converted"] = conversion.description
    else:
        weights = copy_weights(base, source, folder)
    require_whole(base, config, folder)
    if source.kind == "local":
        origin["source"] = original | {name: digest(source.path(name)) for name in weights}
    return origin


def require_whole(base: Base, config: dict[str, Any], folder: Path) -> None:
    """Raises a Fault unless a folder has the weights that its model needs; prints what is unused.

    `config` is the base's own, before a conversion.
    """
    from reward.model.head import is_classifier, problem_with_head
    from reward.model.suitable import on_meta, problem_with_weights, unused_weights

    try:
        model, report = on_meta(folder)
    except RuntimeError as error:  # parts of a tensor that transformers puts together
        raise base.fault(
            f"has weights that transformers cannot load ({one_line(error, 200)}), expected all "
            "that its config.json needs"
        ) from None
    except ValueError as error:  # keys of a config.json that do not suit its model
        raise base.fault(
            f"has a config.json with which transformers cannot load it ({one_line(error, 200)}), "
            "expected one that suits the model"
        ) from None
    reason = problem_with_head(report) if is_classifier(config) else None
    if reason := reason or problem_with_weights(model, report):
        raise base.fault(reason)
    if unused := unused_weights(report):
        print(
            f"unused     {counted(len(unused), 'tensor')} that a {type(model).__name__} does not "
            f"have, such as {unused[0]}"
        )


def require_weights(base: Base, source: Source) -> None:
    """Raises a Fault without weights in safetensors under the names that transformers loads."""
    if not source.matching([WEIGHTS, INDEX]):
        if ADAPTER_CONFIG in source.names:
            raise base.fault("is an adapter, expected a whole model, such as merged/ of an export")
        others = source.matching([f"*{suffix}" for suffix in WEIGHT_SUFFIXES])
        found = f"only {', '.join(others[:3])}" if others else "no weights"
        raise base.fault(f"has {found}, expected {WEIGHTS}, or {INDEX} and its shards")


def copy_weights(base: Base, source: Source, folder: Path) -> list[str]:
    """Copy the weight files byte for byte. Returns their names."""
    names = weight_files(base, source)
    for name in with_bar(names, "copying weights"):
        copy_file(source.path(name), folder / name)
        if name != INDEX:
            with tensors_of(base, folder / name) as file:
                require_floats(base, file)
    return names


def require_floats(base: Base, file: Any) -> None:
    """Raises a Fault if an open safetensors file holds quantized weights."""
    from reward.model.suitable import problem_with_types

    types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    if reason := problem_with_types(types):
        raise base.fault(reason)


def convert_weights(
    base: Base, source: Source, folder: Path, conversion: "Conversion"
) -> list[str]:
    """Write the weights of the converted base file by file. Returns the names of the originals."""
    from safetensors.torch import save_file

    names = weight_files(base, source)
    places: dict[str, str] = {}
    size = 0
    for name in with_bar([name for name in names if name != INDEX], "converting weights"):
        with tensors_of(base, source.path(name)) as file:
            require_floats(base, file)
            found = {
                new: tensor.contiguous()
                for old in file.keys()  # noqa: SIM118
                for new, tensor in conversion.tensors(old, partial(file.get_tensor, old)).items()
            }
        if found:
            held = sum(tensor.nbytes for tensor in found.values())
            with writing(folder, room=held):
                save_file(found, folder / name, {"format": "pt"})
            places |= dict.fromkeys(found, name)
            size += held
    if not places:
        raise base.fault(f"has no weights of {conversion.description}, expected a whole model")
    if INDEX in names:
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": places})
    return names


def weight_files(base: Base, source: Source) -> list[str]:
    """The names of the weight files. A single file takes precedence over shards."""
    return source.matching([WEIGHTS]) or shards(base, source)


@contextmanager
def tensors_of(base: Base, path: Path) -> Iterator[Any]:
    """An open safetensors file. Raises a Fault if it is broken."""
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise base.fault(f"has a broken {path.name} ({error}), expected safetensors") from None
    with file:
        yield file


def shards(base: Base, source: Source) -> list[str]:
    """The names of the index and of the shards that it lists. Raises a Fault if one is missing."""
    try:
        names = sorted({*map(str, read_json(source.path(INDEX))["weight_map"].values())})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise base.fault(f"has a broken {INDEX} ({error!r}), expected a weight_map") from None
    if missing := sorted(set(names) - set(source.matching(["*"]))):
        raise base.fault(f"lacks {', '.join(missing[:3])}, expected all shards in its {INDEX}")
    return [INDEX, *names]


def read_config(base: Base, folder: Path) -> dict[str, Any]:
    """The content of config.json. Raises a Fault if it is missing or broken."""
    try:
        config = read_json(folder / "config.json")
    except FileNotFoundError:
        raise base.fault("has no config.json, expected a transformers model") from None
    except ValueError as error:
        raise base.fault(f"has a broken config.json ({error}), expected JSON") from None
    if not isinstance(config, dict):
        raise base.fault(f"has a broken config.json, a {type(config).__name__}, expected an object")
    classes = config.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise base.fault('has a wrong "architectures" in its config.json, expected a list of names')
    return config


def require_suitable(
    base: Base, config: dict[str, Any], conversion: "Conversion | None", source: Source
) -> None:
    """Raises a Fault unless a base with this configuration can become a reward model."""
    from reward.model.suitable import (
        QUANTIZED_FILES,
        UNQUANTIZED,
        problem_with,
        problem_with_quantization,
    )

    reason = problem_with(conversion.config if conversion else config)
    if reason := reason or problem_with_quantization(config):
        raise base.fault(reason)
    if files := source.matching(QUANTIZED_FILES):
        raise base.fault(f"is already quantized ({files[0]}), {UNQUANTIZED}")


def normalize_tokenizer(base: Base, folder: Path) -> None:
    """Replace the tokenizer files by one tokenizer.json and one configuration with the template.

    The tokenizer that transformers builds from a folder is not always the one in its
    tokenizer.json. Later stages read only that file, so it must be the one transformers builds.
    Raises a Fault if the saved tokenizer gives different ids.
    """
    tokenizer = load_tokenizer(base, folder)
    ids = tokenizer(PROBES)["input_ids"]
    path = folder / "tokenizer_config.json"
    config = self_contained(read_json(path) if path.exists() else {}, tokenizer)
    for file in sorted(folder.iterdir()):
        if any(fnmatchcase(file.name, pattern) for pattern in TOKENIZER):
            file.unlink()
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    write_text(folder / "tokenizer.json", backend.to_str(pretty=True))
    write_json(path, config)
    if ids != ids_of_file(folder) or ids != load_tokenizer(base, folder)(PROBES)["input_ids"]:
        raise base.fault(
            "has a tokenizer that gives different ids after it is saved, expected one with a "
            "complete tokenizer.json"
        )


def load_tokenizer(base: Base, folder: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer as transformers builds it. Raises a Fault if it is not a fast one.

    From a folder without a vocabulary, transformers builds an empty tokenizer without an error.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, logging

    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise base.fault(
            f"has no fast tokenizer that loads ({named(error)}), expected a tokenizer.json"
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise base.fault(f"has a slow tokenizer, {type(tokenizer).__name__}, expected a fast one")
    if set(tokenizer(PROBES[0])["input_ids"]) <= set(tokenizer.all_special_ids):
        raise base.fault("has no vocabulary for its tokenizer, expected a tokenizer.json")
    return tokenizer


def ids_of_file(folder: Path) -> list[list[int]]:
    """The ids of the probes from tokenizer.json alone, as later stages read it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [encoding.ids for encoding in tokenizer.encode_batch(PROBES)]


def self_contained(config: dict[str, Any], tokenizer: "PreTrainedTokenizerFast") -> dict[str, Any]:
    """The configuration with the special tokens and chat template from other files of the source.

    A class from the model's own code is left out, because a complete tokenizer.json needs none.
    """
    config = {key: value for key, value in config.items() if key != "fast_tokenizer_files"}
    if config.pop("auto_map", None) or "tokenizer_class" not in config:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in tokenizer.SPECIAL_TOKENS_ATTRIBUTES:
        token = getattr(tokenizer, key)
        if key in config or token is not None:
            config[key] = token
    extra = [str(token) for token in tokenizer.extra_special_tokens]
    if extra and "extra_special_tokens" not in config:
        config["additional_special_tokens"] = extra
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    config.pop("chat_template", None)
    return config | ({"chat_template": template} if template else {})


if __name__ == "__main__":
    run_stage("stages.fetch", __doc__, main)
