"""Bytes to train on: the standard library's source, or any text, split by file."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..terminal import printable

LIMIT = 16 * 2**20
SHARE = 0.1
LEAST_TRAIN, LEAST_VALIDATION = 8192, 512
# Other people's code, tests, programs, and generated tables: not the library's own source.
SKIPPED = frozenset(
    [
        "site-packages",
        "dist-packages",
        "__pycache__",
        "test",
        "tests",
        "lib2to3",
        "idlelib",
        "turtledemo",
        "encodings",
    ]
)


@dataclass(frozen=True)
class Document:
    """One text: its name inside the corpus and its bytes."""

    name: str
    data: bytes


@dataclass(frozen=True)
class Corpus:
    """Two disjoint sets of texts, each as one uint8 tensor of shape (bytes,)."""

    name: str
    train: Tensor
    validation: Tensor
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]


def load_corpus(path: str | Path | None = None, *, tuning: bool = False) -> Corpus:
    """Read texts and hold a tenth of their bytes out for validation.

    Args:
        path: a text file (its last tenth is held out) or a folder, read recursively without
            binary files; None is the source of the running Python's standard library.
        tuning: hide the validation texts, and hold a tenth of the training texts out in their
            place, so that rates can be chosen without seeing what the demo reports.

    Raises:
        ValueError: the path does not exist, or holds too little text.
        OSError: the path itself cannot be read.
    """
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        name, suffix, skipped = "Python standard library", ".py", SKIPPED
    else:
        root = Path(path)
        name, suffix, skipped = printable(root.name or str(root)), "", frozenset[str]()
    if not root.exists():
        raise ValueError(f"no corpus at {root}: give a text file or a folder of text files")
    train = list(_read(root, suffix, skipped))
    validation, train = split(train)
    if tuning:
        validation, train = split(train)
    corpus = Corpus(
        name,
        _join(train),
        _join(validation),
        tuple(document.name for document in train),
        tuple(document.name for document in validation),
    )
    if corpus.train.numel() < LEAST_TRAIN or corpus.validation.numel() < LEAST_VALIDATION:
        raise ValueError(
            f"too little text in {root}: {corpus.train.numel():,} bytes to train on and "
            f"{corpus.validation.numel():,} to validate; at least {LEAST_TRAIN:,} and "
            f"{LEAST_VALIDATION:,} are needed"
        )
    return corpus


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Hold about a tenth of the bytes out: whole texts, or the end of the only one.

    Args:
        documents: texts in the order in which they are offered to the held-out set.

    Returns:
        The held-out texts and the others, both in the given order.
    """
    if len(documents) < 2:
        cuts = [(text, len(text.data) - int(SHARE * len(text.data))) for text in documents]
        return (
            [Document(text.name, text.data[cut:]) for text, cut in cuts],
            [Document(text.name, text.data[:cut]) for text, cut in cuts],
        )
    room = SHARE * sum(len(document.data) for document in documents)
    held: list[Document] = []
    for document in documents:
        if len(document.data) <= room:
            held.append(document)
            room -= len(document.data)
    if not held:
        held = [min(documents, key=lambda document: len(document.data))]
    names = {document.name for document in held}
    return held, [document for document in documents if document.name not in names]


def _read(root: Path, suffix: str, skipped: frozenset[str]) -> Iterator[Document]:
    """Yield distinct readable texts in the order of their names' hashes, up to LIMIT bytes."""
    total, seen = 0, set[bytes]()
    for name, path in sorted(_files(root, suffix, skipped), key=lambda item: _digest(item[0])):
        try:
            with path.open("rb") as file:
                data = file.read(LIMIT - total)
        except OSError:
            if path == root:
                raise
            continue
        content = hashlib.blake2b(data, digest_size=16).digest()
        if not data or b"\0" in data[:8192] or content in seen:
            continue
        seen.add(content)
        total += len(data)
        yield Document(name, data)
        if total >= LIMIT:
            return


def _files(root: Path, suffix: str, skipped: frozenset[str]) -> Iterator[tuple[str, Path]]:
    """Yield (name relative to the root, path) of each regular file under the root."""
    if root.is_file():
        yield root.name, root
        return
    os.scandir(root).close()  # says why the root cannot be read; `walk` skips what it cannot read
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped]
        for name in files:
            path = Path(folder, name)
            if name.endswith(suffix) and path.is_file():
                yield path.relative_to(root).as_posix(), path


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=16).digest()


def _join(documents: Sequence[Document]) -> Tensor:
    data = b"".join(document.data for document in documents)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)
