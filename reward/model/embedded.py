"""The embedded base model: a real but very small Qwen2, built from a seed and data/corpus.

With it the whole pipeline runs, and learns something, without internet access. Its tokenizer is a
byte-level BPE with Qwen2's special tokens and pre-tokenization and a chat template like Qwen2's.
Its weights come from a short pretraining on the committed corpus. It is only for trying things out.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from reward.outputs import read_json, write_json, writing
from reward.process import Fault, threads

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Generator, Tensor
    from transformers import Qwen2ForCausalLM

NAME = "embedded/tiny-qwen2"
CORPUS = Path("data/corpus")
VOCABULARY = 4096
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PRETOKENS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STEPS, ROWS, LENGTH, PEAK_RATE = 80, 8, 192, 2e-3


def build(folder: Path, seed: int) -> None:
    """Write the config, weights and tokenizer of the embedded model to an empty folder."""
    corpus = paragraphs(CORPUS)
    tokenizer = train_tokenizer(corpus)
    save_tokenizer(tokenizer, folder)
    save_model(pretrain(corpus, tokenizer, seed), folder)


def paragraphs(folder: Path) -> list[str]:
    """The paragraphs of the corpus, in the order of its files. Raises a Fault if it has none."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]
    parts = [part.strip() for text in texts for part in text.split("\n\n") if part.strip()]
    if not parts:
        raise Fault(f"{folder} has no .txt files with text, expected the corpus of {NAME}")
    return parts


def save_tokenizer(tokenizer: "Tokenizer", folder: Path) -> None:
    """Write the tokenizer with a configuration like that of Qwen2's base models: pad is eos."""
    with writing(folder / "tokenizer.json"):
        tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "chat_template": CHAT,
            "clean_up_tokenization_spaces": False,
            "eos_token": SPECIAL[0],
            "model_max_length": 32768,
            "pad_token": SPECIAL[0],
        },
    )


def save_model(model: "Qwen2ForCausalLM", folder: Path) -> None:
    """Write weights and configuration, without a progress bar or the version of transformers."""
    from transformers import logging

    logging.disable_progress_bar()
    with writing(folder, room=sum(weight.nbytes for weight in model.parameters())):
        model.save_pretrained(folder)
    for path in (folder / "config.json", folder / "generation_config.json"):
        content = read_json(path)
        del content["transformers_version"]
        write_json(path, content)


def train_tokenizer(corpus: list[str]) -> "Tokenizer":
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer


def pretrain(corpus: list[str], tokenizer: "Tokenizer", seed: int) -> "Qwen2ForCausalLM":
    """A model pretrained on the corpus for a few epochs, on rows of LENGTH ids."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.set_num_threads(threads())
    torch.manual_seed(seed)
    end = tokenizer.encode(SPECIAL[0]).ids[0]
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=528,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
            bos_token_id=end,
            eos_token_id=end,
            use_cache=False,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, STEPS, pct_start=0.1)
    model.train()
    for batch in tqdm(
        islice(batches(corpus, tokenizer, end, torch.Generator().manual_seed(seed)), STEPS),
        total=STEPS,
        desc="pretraining",
        unit=" steps",
        delay=2,
        disable=None,
    ):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    print(f"{NAME}: {STEPS} steps of pretraining, last loss {loss.item():.2f}")
    return model


def batches(
    corpus: list[str], tokenizer: "Tokenizer", end: int, generator: "Generator"
) -> Iterator["Tensor"]:
    """Endless batches of shape [ROWS, LENGTH]; the paragraphs are shuffled in every epoch."""
    import torch

    encoded = [[*encoding.ids, end] for encoding in tokenizer.encode_batch(corpus)]

    def stream() -> Iterator[int]:
        while True:
            for index in torch.randperm(len(encoded), generator=generator).tolist():
                yield from encoded[index]

    ids = stream()
    while True:
        yield torch.tensor(list(islice(ids, ROWS * LENGTH))).view(ROWS, LENGTH)
