"""Where a row of results comes from."""

from __future__ import annotations

import datetime
import shutil
import subprocess
from pathlib import Path

import torch


def provenance() -> dict[str, str]:
    """Return the columns that every row of results should have."""
    return {"torch": torch.__version__, "commit": commit(), "date": today()}


def commit() -> str:
    """Return the short name of the checkout's commit, with + when files differ; none without."""
    head = output("git", "rev-parse", "--short", "HEAD")
    return head + "+" if head and output("git", "status", "--porcelain") else head or "none"


def today() -> str:
    """Return the date, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def output(*command: str) -> str:
    """Return what a command prints, run here; nothing if it fails or is not there."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""
