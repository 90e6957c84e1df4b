"""What to cite: the papers behind the methods, and this package, as BibTeX.

CITATION.cff and the README show what stands here; `tests/unit/test_citations.py` compares them.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable

from .._version import __released__, __version__
from .bibliography import DETTMERS, HALKO, KINGMA, LOSHCHILOV, Paper
from .registry import CITED

ACCENTS = {"\N{COMBINING ACUTE ACCENT}": r"\'", "\N{COMBINING CARON}": r"\v "}
PACKAGE = "lowrank-optim"
TITLE = "lowrank-optim: memory-efficient low-rank optimizers for PyTorch"
AUTHORS = "The lowrank-optim authors"
METHODS: dict[str, tuple[str, tuple[Paper, ...]]] = {
    **{name: (method.title, method.papers) for name, method in CITED.items()},
    "adamw": ("what is not projected, and the rule of all methods", (LOSHCHILOV, KINGMA)),
    "8bit": ('state_dtype="8bit"', (DETTMERS,)),
    "power": ('projector="power"', (HALKO,)),
    PACKAGE: ("this package", ()),
}
"""Each name that can be cited: what it is, and its papers."""

PAPERS = tuple(dict.fromkeys(paper for _, found in METHODS.values() for paper in found))
"""All of them, each once."""


def papers(name: str) -> tuple[Paper, ...]:
    """Return the papers of a method.

    Raises:
        ValueError: the name is unknown; the message has the nearest ones.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(METHODS)}"
        raise ValueError(f"nothing to cite for '{name}': {hint}")
    return METHODS[name][1]


def bibtex(names: Iterable[str]) -> str:
    """Return the entries of these methods, each paper once, and of this package, as one text.

    Args:
        names: keys of METHODS, in any case; a class such as "GaLoreAdamW" stands for its method.

    Raises:
        ValueError: a name is unknown.
    """
    entries = {paper.key: entry_of(paper) for name in names for paper in papers(_method(name))}
    return "\n".join([*entries.values(), package_bibtex()])


def entry_of(paper: Paper) -> str:
    """Return the BibTeX entry of a paper, in ASCII."""
    fields = {"title": f"{{{paper.title}}}", "author": " and ".join(paper.authors)}
    kind = "misc"
    if paper.venue:
        kind = "article" if paper.journal else "inproceedings"
        fields["journal" if paper.journal else "booktitle"] = paper.venue
    fields["year"] = str(paper.year)
    if paper.page:
        fields["url"] = paper.page
    else:
        fields |= {"eprint": paper.arxiv, "archiveprefix": "arXiv"}
    return _entry(kind, paper.key, fields)


def package_bibtex() -> str:
    """Return the BibTeX entry of this version of the package."""
    fields = {"title": f"{{{TITLE}}}", "author": f"{{{AUTHORS}}}"}
    fields |= {"year": __released__[:4], "note": f"Version {__version__}"}
    return _entry("misc", "lowrank_optim", fields)


def listing() -> str:
    """Return a line for each name: what it is, and its papers in short."""
    lines = []
    for name, (what, found) in METHODS.items():
        short = [f"{paper.authors[0].partition(',')[0]} {paper.year}" for paper in found]
        lines.append(f"{name:<13}  {what}" + (f" ({', '.join(short)})" if short else ""))
    return "\n".join(lines) + "\n"


def _method(name: str) -> str:
    """Return the name of a method that may be given by its class."""
    classes = {what.lower(): method for method, (what, _) in METHODS.items()}
    return classes.get(name.lower(), name.lower())


def _entry(kind: str, key: str, fields: dict[str, str]) -> str:
    width = max(map(len, fields))
    lines = [f"  {field:<{width}} = {{{_ascii(value)}}}," for field, value in fields.items()]
    return "\n".join([f"@{kind}{{{key},", *lines, "}\n"])


def _ascii(text: str) -> str:
    r"""Return the text with accents as BibTeX writes them: a with an acute accent is {\'a}."""
    found = ""
    for letter in unicodedata.normalize("NFD", text):
        if unicodedata.combining(letter):
            found = f"{found[:-1]}{{{ACCENTS[letter]}{found[-1]}}}"
        else:
            found += letter
    return found
