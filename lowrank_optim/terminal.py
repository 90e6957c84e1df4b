"""What all commands share: reading arguments, complaining in one line, writing whole files."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn


class CommandError(Exception):
    """What went wrong, in one line for the person at the terminal."""


class Parser(argparse.ArgumentParser):
    """A parser that complains in one line, as every command does."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the arguments, and exit with status 2."""
        complain(f"{message}; see {self.prog} --help")
        self.exit(2)


def complain(text: str) -> None:
    """Write exactly one line to stderr."""
    sys.stderr.write(f"lowrank-optim: {printable(' '.join(text.split()))}\n")


def printable(text: str) -> str:
    """Return a text with U+FFFD for control characters and for bytes that are not UTF-8."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def named(text: str) -> str:
    """Read an argument that must not be empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def path(text: str) -> Path:
    """Read a path, which must not be empty: that would be the current folder."""
    return Path(named(text))


def whole(least: int, most: int) -> Callable[[str], int]:
    """Return a reader of whole numbers within bounds."""

    def read(text: str) -> int:
        digits = text.isascii() and text.isdigit() and len(text) <= len(str(most))
        if not digits or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(
                f"'{text}' is not a whole number from {least} to {most}"
            )
        return int(text)

    return read


def rank(text: str) -> int | float:
    """Read a number of columns (48) or a share of the projected axis (0.25)."""
    try:
        value = int(text) if text.isdigit() else float(text)
    except ValueError:
        value = 0
    if not (value >= 1 if isinstance(value, int) else 0 < value <= 1):
        raise argparse.ArgumentTypeError(
            f"'{text}' is neither a number of columns nor a share in (0, 1]"
        )
    return value


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yield a path beside another, which it replaces once the block has written it.

    Raises:
        CommandError: it cannot be written; what was at `target` is still there.
    """
    beside = target.with_name(f".lowrank-optim-{os.getpid()}{target.suffix}")
    try:
        yield beside
        beside.replace(target)
    except OSError as error:
        raise CommandError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def finish_output() -> None:
    """Write out what was printed; if that fails, drop it, so that Python does not try again."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise CommandError(f"cannot print: {error.strerror or error}") from error
