"""Real text from this machine as tokens: the source and documentation of what is installed.

The source "machine" reads the standard library and all packages, and is another text wherever other
packages are. The source "stdlib" reads the modules of the standard library alone, which are the
same wherever the same release of Python is.

Texts are taken in the order of their names' hashes, so that any number of bytes is a fair sample.
A text is left out if half of its lines stood in texts before it: copies, vendored ones, licences.
Whole files are held out, for the choice of rates and for the final losses; the tokenizer, a
byte-level BPE, sees the training texts alone. A manifest says what was read, by hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt")
SKIPPED = frozenset(
    ["__pycache__", "test", "tests", "lowrank_optim", "encodings", "lib2to3", "idlelib"]
)
LARGEST = 2**18
"""Bytes; longer files are generated tables more often than not."""
SOURCES = ("machine", "stdlib")
SPLITS = ("final", "tune", "train")
HELD = 50
"""One text in so many goes to each of the held-out splits."""
BYTES = 256
"""Vocabulary that means bytes, without a tokenizer."""
END = "<|end|>"


@dataclass(frozen=True)
class Data:
    """Tokens of each split, packed end to end with a mark between texts, and their source."""

    splits: dict[str, Tensor]
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """Return what tells the text from others: the head of the training tokens' hash."""
        return str(self.manifest["train"]["sha256"])[:12]


@lru_cache(maxsize=1)
def load(vocab: int, limit: int, work: Path, source: str = "machine") -> Data:
    """Return the tokens for a vocabulary, from a cache in `work` if it is there.

    Args:
        vocab: size of the BPE; 256 for bytes.
        limit: bytes of text to read.
        work: folder of the cache; deleting it reads the machine's text again.
        source: one of `SOURCES`.
    """
    mark = "" if source == "machine" else f"{source}-"
    path = work / f"text-{mark}{vocab}-{limit >> 20}.npz"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        arrays, manifest = prepare(roots(source), vocab, limit, source)
        arrays["manifest"] = np.frombuffer(json.dumps(manifest).encode(), dtype=np.uint8)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        with unfinished.open("wb") as file:
            np.savez_compressed(file, **arrays)
        unfinished.replace(path)
    with np.load(path) as saved:
        splits = {name: torch.from_numpy(saved[name].astype(np.int32)) for name in SPLITS}
        return Data(splits, json.loads(saved["manifest"].tobytes()))


def roots(source: str) -> list[Path]:
    """Return the folders of the standard library and, unless it is all, of what is installed."""
    paths = sysconfig.get_paths()
    stdlib = Path(paths["stdlib"])
    return [stdlib] if source == "stdlib" else [stdlib, Path(paths["purelib"])]


def prepare(
    folders: Sequence[Path], vocab: int, limit: int, source: str = "machine"
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read, split and encode; returns arrays by split and the manifest."""
    found = read(folders)
    if source == "stdlib":
        found = standard(found)
    texts: dict[str, list[bytes]] = {name: [] for name in SPLITS}
    total = 0
    for name, text in distinct(found):
        texts[split_of(name)].append(text)
        total += len(text)
        if total >= limit:
            break
    manifest: dict[str, Any] = {
        "vocab": vocab,
        "tokenizer": "bytes" if vocab == BYTES else "byte-level BPE of the training texts",
        "python": platform.python_version(),
    }
    if source == "machine":
        manifest["packages"] = sorted(
            f"{package.metadata['Name']} {package.version}"
            for package in distributions()
            if package.metadata["Name"] != "lowrank-optim"
        )
    arrays = encode(texts, vocab)
    for name in SPLITS:
        manifest[name] = {
            "files": len(texts[name]),
            "bytes": sum(map(len, texts[name])),
            "tokens": len(arrays[name]),
            "sha256": hashlib.sha256(arrays[name].tobytes()).hexdigest(),
        }
    return arrays, manifest


def read(folders: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, text) of all text files, in the order of their names' hashes."""
    found: dict[str, Path] = {}
    for root in folders:
        for folder, below, files in os.walk(root):
            below[:] = [name for name in below if name not in SKIPPED and "-packages" not in name]
            for file in files:
                if file.endswith(SUFFIXES):
                    path = Path(folder, file)
                    found[f"{root.name}/{path.relative_to(root).as_posix()}"] = path
    for name in sorted(found, key=digest):
        try:
            text = found[name].read_bytes()
        except OSError:
            continue
        if 256 <= len(text) <= LARGEST and b"\0" not in text:
            yield name, text


def standard(texts: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    """Leave out what a build or a distribution adds to the standard library's modules."""
    for name, text in texts:
        if name.split("/")[1].removesuffix(".py") in sys.stdlib_module_names:
            yield name, text


def distinct(texts: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    """Leave out texts of which half the lines, of twenty bytes or more, are known already."""
    seen: set[int] = set()
    for name, text in texts:
        lines = {hash(line) for line in map(bytes.strip, text.splitlines()) if len(line) >= 20}
        if 2 * len(lines & seen) >= max(1, len(lines)):
            continue
        seen |= lines
        yield name, text


def split_of(name: str) -> str:
    """Return the split of a file; it depends on its name alone."""
    return SPLITS[min(digest(f"split {name}") % HELD, 2)]


def digest(name: str) -> int:
    """Return a number of 64 bits that depends on a name alone."""
    code = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(code, "big")


def encode(texts: dict[str, list[bytes]], vocab: int) -> dict[str, np.ndarray]:
    """Return tokens by split; the mark between texts is a byte 0, or the BPE's END."""
    if vocab == BYTES:
        return {
            name: np.frombuffer(b"\0".join(found) + b"\0", dtype=np.uint8)
            for name, found in texts.items()
        }
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    strings = {
        name: [text.decode("utf-8", errors="replace") for text in found]
        for name, found in texts.items()
    }
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(strings["train"], trainer)
    end = tokenizer.token_to_id(END)
    arrays = {}
    for name, found in strings.items():
        packed: list[int] = []
        for encoding in tokenizer.encode_batch(found):
            packed += [*encoding.ids, end]
        arrays[name] = np.array(packed, dtype=np.uint16)
    return arrays
