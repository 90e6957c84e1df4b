"""What to cite: the papers behind the methods, and this package, as BibTeX.

CITATION.cff and the README show what stands here; `tests/unit/test_citations.py` compares them.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from .._version import __released__, __version__

ICLR = "International Conference on Learning Representations"
ICML = "International Conference on Machine Learning"
ACCENTS = {"\N{COMBINING ACUTE ACCENT}": r"\'", "\N{COMBINING CARON}": r"\v "}


@dataclass(frozen=True)
class Paper:
    """One paper: authors as "Family, Given", all of them; where it appeared, if it did.

    `arxiv` is empty for what has a `page` instead.
    """

    key: str
    title: str
    authors: tuple[str, ...]
    year: int
    arxiv: str
    venue: str = ""
    journal: bool = False
    page: str = ""

    @property
    def url(self) -> str:
        """Return its address."""
        return self.page or f"https://arxiv.org/abs/{self.arxiv}"

    def bibtex(self) -> str:
        """Return its BibTeX entry, in ASCII."""
        fields = {"title": f"{{{self.title}}}", "author": " and ".join(self.authors)}
        kind = "misc"
        if self.venue:
            kind = "article" if self.journal else "inproceedings"
            fields["journal" if self.journal else "booktitle"] = self.venue
        fields["year"] = str(self.year)
        if self.page:
            fields["url"] = self.page
        else:
            fields |= {"eprint": self.arxiv, "archiveprefix": "arXiv"}
        return _entry(kind, self.key, fields)


PAPERS = (
    Paper(
        "zhao2024galore",
        "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
        (
            "Zhao, Jiawei",
            "Zhang, Zhenyu",
            "Chen, Beidi",
            "Wang, Zhangyang",
            "Anandkumar, Anima",
            "Tian, Yuandong",
        ),
        2024,
        "2403.03507",
        ICML,
    ),
    Paper(
        "modoranu2025fft",
        "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large "
        "Language Models",
        (
            "Modoranu, Ionut-Vlad",
            "Safaryan, Mher",
            "Schultheis, Erik",
            "Ryabinin, Max",
            "Chumachenko, Artem",
            "Alistarh, Dan",
        ),
        2025,
        "2505.17967",
    ),
    Paper(
        "chen2025fira",
        "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?",
        (
            "Chen, Xi",
            "Feng, Kaituo",
            "Li, Changsheng",
            "Lai, Xunhao",
            "Yue, Xiangyu",
            "Yuan, Ye",
            "Wang, Guoren",
        ),
        2025,
        "2410.01623",
        "Advances in Neural Information Processing Systems",
    ),
    Paper(
        "zmushko2025frugal",
        "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training",
        ("Zmushko, Philip", "Beznosikov, Aleksandr", "Takáč, Martin", "Horváth, Samuel"),
        2025,
        "2411.07837",
        ICML,
    ),
    Paper(
        "zhu2025apollo",
        "APOLLO: SGD-like Memory, AdamW-level Performance",
        (
            "Zhu, Hanqing",
            "Zhang, Zhenyu",
            "Cong, Wenyan",
            "Liu, Xi",
            "Park, Sem",
            "Chandra, Vikas",
            "Long, Bo",
            "Pan, David Z.",
            "Wang, Zhangyang",
            "Lee, Jinwon",
        ),
        2025,
        "2412.05270",
        "Conference on Machine Learning and Systems",
    ),
    Paper(
        "robert2025ldadam",
        "LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics",
        ("Robert, Thomas", "Safaryan, Mher", "Modoranu, Ionut-Vlad", "Alistarh, Dan"),
        2025,
        "2410.16103",
        ICLR,
    ),
    Paper(
        "ahn2025dion",
        "Dion: Distributed Orthonormalized Updates",
        (
            "Ahn, Kwangjun",
            "Xu, Byron",
            "Abreu, Natalie",
            "Fan, Ying",
            "Magakyan, Gagik",
            "Sharma, Pratyusha",
            "Zhan, Zheng",
            "Langford, John",
        ),
        2025,
        "2504.05295",
    ),
    Paper(
        "jordan2024muon",
        "Muon: An Optimizer for Hidden Layers in Neural Networks",
        (
            "Jordan, Keller",
            "Jin, Yuchen",
            "Boza, Vlado",
            "You, Jiacheng",
            "Cesista, Franz",
            "Newhouse, Laker",
            "Bernstein, Jeremy",
        ),
        2024,
        "",
        page="https://kellerjordan.github.io/posts/muon/",
    ),
    Paper(
        "li2025normuon",
        "NorMuon: Making Muon More Efficient and Scalable",
        ("Li, Zichong", "Liu, Liming", "Liang, Chen", "Chen, Weizhu", "Zhao, Tuo"),
        2025,
        "2510.05491",
    ),
    Paper(
        "wang2025conda",
        "Conda: Column-Normalized Adam for Training Large Language Models Faster",
        (
            "Wang, Junjie",
            "Zhou, Pan",
            "Dong, Yiming",
            "Li, Huan",
            "Li, Jia",
            "Zhou, Xun",
            "Lao, Qicheng",
            "Fang, Cong",
            "Lin, Zhouchen",
        ),
        2025,
        "2509.24218",
    ),
    Paper(
        "gong2025towards",
        "Towards Efficient Optimizer Design for LLM via Structured Fisher Approximation with a "
        "Low-Rank Extension",
        ("Gong, Wenbo", "Scetbon, Meyer", "Ma, Chao", "Meeds, Edward"),
        2025,
        "2502.07752",
    ),
    Paper(
        "loshchilov2019adamw",
        "Decoupled Weight Decay Regularization",
        ("Loshchilov, Ilya", "Hutter, Frank"),
        2019,
        "1711.05101",
        ICLR,
    ),
    Paper(
        "kingma2015adam",
        "Adam: A Method for Stochastic Optimization",
        ("Kingma, Diederik P.", "Ba, Jimmy"),
        2015,
        "1412.6980",
        ICLR,
    ),
    Paper(
        "dettmers2022eightbit",
        "8-bit Optimizers via Block-wise Quantization",
        ("Dettmers, Tim", "Lewis, Mike", "Shleifer, Sam", "Zettlemoyer, Luke"),
        2022,
        "2110.02861",
        ICLR,
    ),
    Paper(
        "halko2011structure",
        "Finding Structure with Randomness: Probabilistic Algorithms for Constructing Approximate "
        "Matrix Decompositions",
        ("Halko, Nathan", "Martinsson, Per-Gunnar", "Tropp, Joel A."),
        2011,
        "0909.4061",
        "SIAM Review",
        journal=True,
    ),
)
PACKAGE = "lowrank-optim"
TITLE = "lowrank-optim: memory-efficient low-rank optimizers for PyTorch"
AUTHORS = "The lowrank-optim authors"
METHODS = {
    "lowrank": (
        "LowRankAdamW",
        ("zhao2024galore", "zmushko2025frugal", "halko2011structure"),
    ),
    "galore": ("GaLoreAdamW", ("zhao2024galore",)),
    "dct": ("DCTAdamW", ("modoranu2025fft",)),
    "fira": ("FiraAdamW", ("chen2025fira",)),
    "frugal": ("FrugalAdamW", ("zmushko2025frugal",)),
    "apollo": ("ApolloAdamW", ("zhu2025apollo",)),
    "ldadam": ("LDAdamW", ("robert2025ldadam",)),
    "trion": ("TrionW", ("modoranu2025fft", "ahn2025dion", "jordan2024muon")),
    "muon": ("MuonW", ("jordan2024muon",)),
    "normuon": ("NorMuonW", ("li2025normuon", "jordan2024muon")),
    "conda": ("CondaW", ("wang2025conda",)),
    "compensated": ("CompensatedAdamW", ("gong2025towards",)),
    "racs": ("RACS", ("gong2025towards",)),
    "adamw": ("what is not projected, and the rule of all methods",
              ("loshchilov2019adamw", "kingma2015adam")),
    "8bit": ('state_dtype="8bit"', ("dettmers2022eightbit",)),
    "power": ('projector="power"', ("halko2011structure",)),
    PACKAGE: ("this package", ()),
}  # fmt: skip
"""Each name that can be cited: what it is, and the keys of its papers."""


def papers(name: str) -> list[Paper]:
    """Return the papers of a method.

    Raises:
        ValueError: no such name; the message has those that are near.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(METHODS)}"
        raise ValueError(f"nothing to cite for '{name}': {hint}")
    return [paper for paper in PAPERS if paper.key in METHODS[name][1]]


def bibtex(names: Iterable[str]) -> str:
    """Return the entries of these methods, each paper once, and of this package, as one text.

    Args:
        names: keys of METHODS, in any case; a class such as "GaLoreAdamW" stands for its method.

    Raises:
        ValueError: no such name.
    """
    entries = {paper.key: paper.bibtex() for name in names for paper in papers(_method(name))}
    return "\n".join([*entries.values(), package_bibtex()])


def package_bibtex() -> str:
    """Return the BibTeX entry of this version of the package."""
    fields = {"title": f"{{{TITLE}}}", "author": f"{{{AUTHORS}}}"}
    fields |= {"year": __released__[:4], "note": f"Version {__version__}"}
    return _entry("misc", "lowrank_optim", fields)


def listing() -> str:
    """Return a line for each name: what it is, and its papers in short."""
    lines = []
    for name, (what, keys) in METHODS.items():
        short = [f"{p.authors[0].partition(',')[0]} {p.year}" for p in PAPERS if p.key in keys]
        lines.append(f"{name:<13}  {what}" + (f" ({', '.join(short)})" if short else ""))
    return "\n".join(lines) + "\n"


def _method(name: str) -> str:
    """Return the name of a method, which may be given by its class."""
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
