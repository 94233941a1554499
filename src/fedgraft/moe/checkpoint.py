"""What can be said about a checkpoint folder from its file names and safetensors headers, before any weight is read."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fedgraft import files

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZERS = frozenset(
    [
        "tokenizer.json",
        "tokenizer.model",
        "vocab.json",
        "vocab.txt",
        "spiece.model",
        "sentencepiece.bpe.model",
        "tekken.json",
        "tiktoken.model",
    ]
)
PICKLES = frozenset([".bin", ".pt", ".pth", ".ckpt"])
PLAIN = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Element types of unpacked weights, as safetensors and as torch call them."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The weights of a folder, by their headers."""

    folder: Path
    shards: tuple[Path, ...]
    dtypes: dict[str, str]
    """Tensor name -> element type as safetensors writes it (F32, BF16, U8, ...)."""
    shapes: dict[str, tuple[int, ...]]
    where: dict[str, Path]
    """Tensor name -> the shard that holds it."""
    ignored: tuple[str, ...]
    """Weight files that are not part of the model: what lies beside it under other names."""

    def stored(self) -> set[str]:
        """The float types of its matrices, by torch's names."""
        return {PLAIN[kind] for name, kind in self.dtypes.items() if kind in PLAIN and len(self.shapes[name]) > 1}

    def packed(self) -> dict[str, str]:
        """Matrices that are not plain floats, with their element type: quantised weights."""
        return {
            name: kind for name, kind in self.dtypes.items() if kind not in PLAIN | {"BOOL": "", "I64": ""} and len(self.shapes[name]) > 1
        }


def inspect_folder(folder: Path) -> Checkpoint:
    """Check a model folder for completeness.

    Raises:
        ValueError: a file is missing, superfluous, cut off or not safetensors, or an expert is missing; named, with the remedy.
    """
    names = {entry.name for entry in folder.iterdir()}
    if "config.json" not in names:
        raise ValueError(f"{folder}: not a model folder, it has no config.json; give the folder that save_pretrained or the hub made")
    if "adapter_config.json" in names:
        raise ValueError(f"{folder}: holds a PEFT adapter; merge it into its base (merge_and_unload, save_pretrained) and give that folder")
    if not names & TOKENIZERS:
        raise ValueError(f"{folder}: no tokenizer files (tokenizer.json or tokenizer.model); copy them from where the model came from")
    shards = _shards(folder, names)
    dtypes: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    where: dict[str, Path] = {}
    for shard, expected in shards.items():
        found = _header(shard)
        absent = sorted(expected - found.keys())
        if absent:
            raise ValueError(f"{shard}: lacks {_listed(absent)}, which {INDEX} expects there; copy the shard again")
        dtypes |= {name: kind for name, (kind, _) in found.items()}
        shapes |= {name: shape for name, (_, shape) in found.items()}
        where |= dict.fromkeys(found, shard)
    _check_experts(folder, shapes)
    ignored = sorted(name for name in names if name.endswith(".safetensors") and folder / name not in shards)
    return Checkpoint(folder=folder, shards=tuple(shards), dtypes=dtypes, shapes=shapes, where=where, ignored=tuple(ignored))


def _shards(folder: Path, names: set[str]) -> dict[Path, set[str]]:
    """The weight files with the tensors that the index expects in each.

    A file named like a shard that the index does not name is refused: the index or the file is from another model. Files of other names,
    such as consolidated.safetensors, hold the same weights in another form and are left alone.
    """
    numbered = {name for name in names if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name)}
    if INDEX not in names:
        if numbered == {SINGLE}:
            return {folder / SINGLE: set()}
        if numbered:
            raise ValueError(f"{folder}: has {_listed(sorted(numbered))} but no {INDEX}; copy that file too")
        raise ValueError(f"{folder}: {_no_weights(names)}")
    expected: dict[str, set[str]] = defaultdict(set)
    try:
        for tensor, shard in files.parse_json((folder / INDEX).read_bytes())["weight_map"].items():
            expected[str(shard)].add(tensor)
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{folder / INDEX}: not a safetensors index; copy it again") from None
    missing = sorted(expected.keys() - names)
    if missing:
        raise ValueError(f"{folder}: missing {_listed(missing)} of {len(expected)} shards named in {INDEX}; copy it into the folder")
    extra = sorted(numbered - expected.keys())
    if extra:
        raise ValueError(
            f"{folder}: {_listed(extra)} is not in {INDEX}, so it is from another model; remove it, or the index if that is old"
        )
    return {folder / shard: expected[shard] for shard in sorted(expected)}


def _no_weights(names: set[str]) -> str:
    pickles = sorted(name for name in names if Path(name).suffix in PICKLES and name != "training_args.bin")
    if pickles:
        return (
            f"only pickled weights ({_listed(pickles)}), which can run code when opened and are never read; if you trust their source, "
            "convert them with transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    if any(name.endswith(".gguf") for name in names):
        return "only GGUF weights; give the safetensors checkpoint they were made from"
    return f"no weights: neither {SINGLE} nor {INDEX}; copy the model's safetensors files into it"


def _header(shard: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name -> (element type, shape)."""
    with shard.open("rb") as content:
        if content.read(24) == b"version https://git-lfs.":
            raise ValueError(f"{shard}: a git-lfs pointer, not the weights; run: git lfs pull")
    try:
        with safe_open(shard, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {name: (str(part.get_dtype()), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        size = shard.stat().st_size
        raise ValueError(f"{shard}: not a complete safetensors file ({size:,} bytes; {error}); copy it again") from None


def _check_experts(folder: Path, names: dict[str, tuple[int, ...]]) -> None:
    """Experts stored one by one are counted without a gap. How many there must be, only the model knows."""
    numbers: dict[tuple[str, str], set[int]] = defaultdict(set)
    for name in names:
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(.+)", name):
            numbers[match[1], match[3]].add(int(match[2]))
    for (path, projection), present in numbers.items():
        gaps = set(range(max(present))) - present
        if gaps:
            raise ValueError(f"{folder}: the weights lack {path}.{min(gaps)}.{projection}; the checkpoint is incomplete, copy it again")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
