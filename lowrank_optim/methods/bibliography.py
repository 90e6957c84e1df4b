"""Papers of parts, as records; papers of methods stand in the files of the methods."""

from __future__ import annotations

from dataclasses import dataclass

ICLR = "International Conference on Learning Representations"
ICML = "International Conference on Machine Learning"


@dataclass(frozen=True)
class Paper:
    """One paper: authors as "Family, Given", all of them; where it appeared, if it did.

    `arxiv` is empty if the paper has a `page` instead.
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


LOSHCHILOV = Paper(
    "loshchilov2019adamw",
    "Decoupled Weight Decay Regularization",
    ("Loshchilov, Ilya", "Hutter, Frank"),
    2019,
    "1711.05101",
    ICLR,
)
KINGMA = Paper(
    "kingma2015adam",
    "Adam: A Method for Stochastic Optimization",
    ("Kingma, Diederik P.", "Ba, Jimmy"),
    2015,
    "1412.6980",
    ICLR,
)
DETTMERS = Paper(
    "dettmers2022eightbit",
    "8-bit Optimizers via Block-wise Quantization",
    ("Dettmers, Tim", "Lewis, Mike", "Shleifer, Sam", "Zettlemoyer, Luke"),
    2022,
    "2110.02861",
    ICLR,
)
HALKO = Paper(
    "halko2011structure",
    "Finding Structure with Randomness: Probabilistic Algorithms for Constructing Approximate "
    "Matrix Decompositions",
    ("Halko, Nathan", "Martinsson, Per-Gunnar", "Tropp, Joel A."),
    2011,
    "0909.4061",
    "SIAM Review",
    journal=True,
)
