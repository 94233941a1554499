"""Turn the public corpora into a tokenizer and token files for `train.py`.

Reads the folder `--corpus` (one `corpus/<name>.jsonl.xz` per source plus `dolly15k.jsonl.gz`), holds 1 % of the documents out by the hash
of their text, trains a byte-level BPE tokenizer on the rest and writes `<name>.train.npy` / `<name>.held.npy` (uint16) per source, the chat
rows of the mid-training stage and `held_out.jsonl` with the raw held-out documents.

The Dolly categories used by experiments (closed_qa, information_extraction, classification, summarization) are left out, as is any row of
another category whose instruction or response also occurs in one of them.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SOURCES = (
    "tinystories_sample",
    "african_storybook_en",
    "fairytales",
    "short_stories",
    "folktales_classics",
    "wikinews",
    "medquad",
)
EXPERIMENT_CATEGORIES = frozenset({"closed_qa", "information_extraction", "classification", "summarization"})
VOCABULARY = 8192
END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def held_out(text: str) -> bool:
    """Whether a document belongs to the 1 % that training never sees (a function of its text alone)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 100 == 0


def documents(corpus: Path, source: str) -> list[str]:
    """All documents of one source, title first where it has one; MedQuAD's with their question."""
    rows = [json.loads(line) for line in lzma.open(corpus / "corpus" / f"{source}.jsonl.xz", "rt")]
    heads = {"medquad": "question", "wikinews": "title"}
    head = heads.get(source)
    return [f"{row[head]}\n\n{row['text']}" if head else row["text"] for row in rows]


def chat_rows(corpus: Path) -> Iterator[tuple[str, str, str]]:
    """(source, user turn, assistant turn) of the mid-training stage."""
    dolly = [json.loads(line) for line in gzip.open(corpus / "dolly15k.jsonl.gz", "rt")]
    kept = [row for row in dolly if row["category"] in EXPERIMENT_CATEGORIES]
    taken = {row[key].strip().lower() for row in kept for key in ("instruction", "response")}
    taken |= {row["context"].strip().lower() for row in kept} - {""}
    for row in dolly:
        parts = [row[key].strip().lower() for key in ("instruction", "response", "context")]
        if row["category"] in EXPERIMENT_CATEGORIES or any(part in taken for part in parts):
            continue
        user = row["instruction"] + (f"\n\n{row['context']}" if row["context"] else "")
        yield "dolly", user, row["response"]
    for line in lzma.open(corpus / "corpus" / "medquad.jsonl.xz", "rt"):
        row = json.loads(line)
        if not held_out(f"{row['question']}\n\n{row['text']}"):
            yield "medquad_chat", row["question"], row["text"]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCABULARY` entries with the chat markers as special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, TURN, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """One stream of token ids, every document closed by the end-of-text token."""
    end = tokenizer.convert_tokens_to_ids(END)
    pieces: list[np.ndarray] = []
    for start in range(0, len(texts), 512):
        for encoding in tokenizer.backend_tokenizer.encode_batch(texts[start : start + 512]):
            pieces.append(np.array([*encoding.ids, end], dtype=np.uint16))
    return np.concatenate(pieces) if pieces else np.zeros(0, np.uint16)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with corpus/*.jsonl.xz and dolly15k.jsonl.gz")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)

    texts = {source: documents(options.corpus, source) for source in SOURCES}
    chats: dict[str, list[str]] = {"dolly": [], "medquad_chat": []}
    for source, user, answer in chat_rows(options.corpus):
        chats[source].append(f"{TURN}user\n{user}{TURN_END}\n{TURN}assistant\n{answer}{TURN_END}\n")
    sample = [text for rows in texts.values() for text in rng.sample(rows, min(len(rows), 1500)) if not held_out(text)]
    sample += [text for rows in chats.values() for text in rng.sample(rows, min(len(rows), 4000))]
    tokenizer = train_tokenizer([part for text in sample for part in text.split("\n\n")])
    tokenizer.save_pretrained(options.out / "tokenizer")

    with (options.out / "held_out.jsonl").open("w") as sink:
        for source, rows in texts.items():
            for text in rows:
                if held_out(text):
                    sink.write(json.dumps({"source": source, "text": text}) + "\n")
    for source, rows in {**texts, **chats}.items():
        rng.shuffle(rows)
        split = {"train": [t for t in rows if not held_out(t)], "held": [t for t in rows if held_out(t)]}
        for name, part in split.items():
            tokens = encode(tokenizer, part)
            np.save(options.out / f"{source}.{name}.npy", tokens)
            print(f"{source}.{name}: {len(part)} documents, {len(tokens)} tokens", flush=True)


if __name__ == "__main__":
    main()
