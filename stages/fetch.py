"""Bring the base model to models/base: from the Hub, from a local folder, or the embedded one.

    python -m stages.fetch

Writes the weights (safetensors as they are), the configuration, the tokenizer as transformers
builds it (one tokenizer.json and one tokenizer_config.json, whatever the source has), and base.json
with the name, the resolved revision and the SHA-256 of every file.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages import embedded, params
from stages.outputs import digests, read_json, whole_folder, write_json
from stages.params import Seed, Switch, Text
from stages.process import Fault, run

BASE = Path("models/base")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
OTHERS = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
PROBE = "问:What's 12 + 30?\n\n答: It's 42, 四十二。 <|endoftext|>"


@dataclass(frozen=True)
class Base:
    """The group `base` of params.yaml, where each key is described."""

    name: Text
    revision: Text
    trust_remote_code: Switch
    seed: Seed


def main() -> None:
    base = params.load("base", Base)
    with whole_folder(BASE) as folder:
        if base.name == embedded.NAME:
            embedded.build(folder, base.seed)
            source = {"kind": "embedded", "revision": f"seed {base.seed}"}
        elif Path(base.name).expanduser().is_dir():
            source = copy_local(base, folder)
        else:
            source = download(base, folder)
        require_decoder(base, folder)
        normalize_tokenizer(base, folder)
        files = digests(folder)
        write_json(folder / "base.json", {"name": base.name, "files": files, **source})
    size = sum(file.stat().st_size for file in BASE.rglob("*")) / 1e6
    print(f"base model {base.name} ({source['revision']}), {size:.0f} MB, is in {BASE}")


def copy_local(base: Base, folder: Path) -> dict[str, Any]:
    """Copy what a model needs from a local folder; remembers the digests of what was copied."""
    source = Path(base.name).expanduser()
    require_safetensors(base.name, [path.name for path in source.iterdir()])
    patterns = WEIGHTS + OTHERS + (("*.py",) if base.trust_remote_code else ())
    for path in sorted({path for pattern in patterns for path in source.glob(pattern)}):
        shutil.copyfile(path, folder / path.name)
    return {"kind": "local", "revision": "local folder", "source": digests(folder)}


def download(base: Base, folder: Path) -> dict[str, Any]:
    """Download from the Hub (or the mirror that HF_ENDPOINT names) at a resolved commit."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = f"params.yaml: base.name {base.name}"
    api = HfApi()
    try:
        info = api.model_info(base.name, revision=base.revision)
        require_safetensors(base.name, [file.rfilename for file in info.siblings or []])
        patterns = WEIGHTS + OTHERS + (("*.py",) if base.trust_remote_code else ())
        snapshot = snapshot_download(
            base.name,
            revision=info.sha,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"],
        )
    except HFValidationError:
        raise Fault(f"{name} is no folder here and no id of a Hub model") from None
    except GatedRepoError:
        raise Fault(
            f"{name} is gated: accept its terms on its page at {api.endpoint} and set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise Fault(f"{name} has no revision {base.revision} (base.revision)") from None
    except RepositoryNotFoundError:
        raise Fault(
            f"{name} is no folder here and no model at {api.endpoint} that you may read; "
            f"wanted a Hub id, a local folder, or {embedded.NAME}"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        detail = " ".join(str(error).split())[:200]
        raise Fault(
            f"{name} is no folder here, and {api.endpoint} could not be reached "
            f"({type(error).__name__}: {detail}); HF_ENDPOINT may name a mirror"
        ) from None
    for path in sorted(Path(snapshot).iterdir()):
        shutil.copyfile(path, folder / path.name)
    return {"kind": "hub", "revision": info.sha}


def require_safetensors(name: str, files: list[str]) -> None:
    if any(file.endswith(".safetensors") for file in files):
        return
    pickles = [file for file in files if file.endswith(PICKLES)]
    found = f"only {', '.join(pickles[:3])}" if pickles else "no weights"
    raise Fault(f"params.yaml: base.name {name} has {found}, wanted weights in safetensors")


def require_decoder(base: Base, folder: Path) -> None:
    """Faults unless the configuration is that of a decoder language model which can be scored."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )

    name = f"params.yaml: base.name {base.name}"
    try:
        config = read_json(folder / "config.json")
    except FileNotFoundError:
        raise Fault(f"{name} has no config.json, wanted a transformers model") from None
    except json.JSONDecodeError as error:
        raise Fault(f"{name} has a broken config.json: {error}") from None
    names = config.get("architectures") or []
    if base.trust_remote_code and "auto_map" in config:
        return
    if (
        not set(names) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
        or config.get("is_encoder_decoder")
        or config.get("model_type") not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    ):
        raise Fault(
            f"{name} is a {', '.join(names) or config.get('model_type')}, "
            "wanted a decoder language model such as Qwen2ForCausalLM"
        )


def normalize_tokenizer(base: Base, folder: Path) -> None:
    """Leave one tokenizer.json, as transformers builds it, and one configuration with its template.

    What transformers makes of a tokenizer folder is not always what its tokenizer.json says;
    later stages read the file alone, so the file must be what transformers runs.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=base.trust_remote_code)
        backend = tokenizer.backend_tokenizer
    except (OSError, ValueError, AttributeError, ImportError) as error:
        detail = " ".join(str(error).split())[:200]
        raise Fault(
            f"params.yaml: base.name {base.name} has no fast tokenizer that loads: {detail}"
        ) from None
    backend.no_padding()
    backend.no_truncation()
    backend.save(str(folder / "tokenizer.json"))
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path) if config_path.exists() else {}
    for key in ("bos_token", "eos_token", "pad_token"):
        config[key] = getattr(tokenizer, key)
    if isinstance(tokenizer.chat_template, str):
        config["chat_template"] = tokenizer.chat_template
    write_json(config_path, config)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    again = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if again.encode(PROBE).ids != tokenizer(PROBE)["input_ids"]:
        raise Fault(
            f"params.yaml: base.name {base.name} has a tokenizer that gives other ids when saved; "
            "wanted one whose tokenizer.json is complete"
        )


if __name__ == "__main__":
    run(main)
