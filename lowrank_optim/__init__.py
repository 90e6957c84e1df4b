"""Drop-in PyTorch optimizers whose state is small because the gradient is projected first."""

from pathlib import Path

from ._version import __version__
from .ddp import projected_all_reduce
from .flat import flatten_state, unflatten_state
from .foreign import import_state
from .groups import param_groups
from .memory import predicted_bytes, state_bytes
from .optimizer import LowRank
from .plan import Plan, Site, Update
from .planner import estimate_memory
from .presets import (
    ApolloAdamW,
    DCTAdamW,
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdamW,
    LowRankAdamW,
)
from .projectors import DCT, SVD, Blocks, Columns, Power, Random
from .residuals import Drop, GradScaled, NormScaled, StateFree
from .rules import SGDM, Adam, Lion
from .settings import SettingError

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    # A bare checkout: there the kernels lie beside this folder, once installed inside it.
    __path__.append(str(_root))

__all__ = [
    "DCT", "SGDM", "SVD", "Adam", "ApolloAdamW", "Blocks", "Columns", "DCTAdamW", "Drop",
    "FiraAdamW", "FrugalAdamW", "GaLoreAdamW", "GradScaled", "Lion", "LowRank", "LowRankAdamW",
    "NormScaled", "Plan", "Power", "Random", "SettingError", "Site", "StateFree", "Update",
    "__version__", "estimate_memory", "flatten_state", "import_state", "param_groups",
    "predicted_bytes", "projected_all_reduce", "state_bytes", "unflatten_state",
]  # fmt: skip
