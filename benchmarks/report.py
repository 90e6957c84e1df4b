"""Tables and figures of README.md and benchmarks/README.md, from results/ alone.

  python benchmarks/report.py            write them
  python benchmarks/report.py --check    write nothing; exit status 1 where one is out of date

A table stands between `<!-- report: NAME -->` and `<!-- end -->`; a figure carries the hash of what
it shows. Losses are those of the rates that the search found best; runs at other rates, made before
a search went on, are in the ledger and not shown.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from pretraining.ledger import Ledger
from pretraining.runner import RESULTS, ROOT
from reporting import figures, tables

DOCS = ("README.md", "benchmarks/README.md", "docs/choosing.md")
BLOCK = re.compile(r"<!-- report: (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def main(argv: list[str] | None = None) -> int:
    """Write or check everything; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the texts and figures")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    ledger = Ledger(args.results)
    stale = []
    for name in DOCS:
        path = args.root / name
        text = path.read_text()
        wanted = filled(text, tables.TABLES, ledger)
        if text != wanted:
            stale.append(name)
            if not args.check:
                path.write_text(wanted)
    for name, figure in figures.FIGURES.items():
        path = args.root / "docs" / name
        content = figure.content(ledger)
        if figures.hash_in(path) != figures.hash_of(content):
            stale.append(f"docs/{name}")
            if not args.check:
                figures.save(figure, content, path)
    for name in stale:
        print(f"{name}: {'not what the results say' if args.check else 'written'}")
    return int(args.check and bool(stale))


def filled(text: str, made: dict[str, Callable[[Ledger], str]], ledger: Ledger) -> str:
    """Return a text with every block made anew.

    Raises:
        KeyError: there is no table of a block's name.
    """

    def fill(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in made:
            raise KeyError(f"no table {name!r}; there are {', '.join(made)}")
        return f"<!-- report: {name} -->\n{made[name](ledger)}\n<!-- end -->"

    return BLOCK.sub(fill, text)


if __name__ == "__main__":
    sys.exit(main())
