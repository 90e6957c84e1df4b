"""Drop-in PyTorch optimizers whose state is small because the gradient is projected first."""

from ._version import __version__
from .groups import param_groups
from .memory import predicted_bytes, state_bytes
from .optimizer import LowRank
from .plan import Plan, Site, Update
from .presets import ApolloAdamW, DCTAdamW, FiraAdamW, FrugalAdamW, GaLoreAdamW
from .projectors import DCT, SVD, Blocks, Columns, Power, Random
from .residuals import Drop, GradScaled, NormScaled, StateFree
from .rules import SGDM, Adam, Lion
from .settings import SettingError

__all__ = [
    "DCT", "SGDM", "SVD", "Adam", "ApolloAdamW", "Blocks", "Columns", "DCTAdamW", "Drop",
    "FiraAdamW", "FrugalAdamW", "GaLoreAdamW", "GradScaled", "Lion", "LowRank", "NormScaled",
    "Plan", "Power", "Random", "SettingError", "Site", "StateFree", "Update", "__version__",
    "param_groups", "predicted_bytes", "state_bytes",
]  # fmt: skip
