"""Drop-in PyTorch optimizers whose state is small because the gradient is projected first."""

from pathlib import Path

from . import methods
from ._version import __version__
from .checkpoints.flatten import flatten_state, unflatten_state
from .checkpoints.imports import import_state
from .engine.memory import predicted_bytes, state_bytes
from .groups import param_groups
from .layerwise.ddp import projected_all_reduce
from .methods import *  # noqa: F403 - `__all__` of methods says which
from .optimizer import LowRank
from .parts.checks import SettingError
from .parts.feeds import ErrorFeedback, GeneralErrorFeedback, Gradient, WholeMomentum
from .parts.plan import Plan
from .parts.projectors import DCT, SVD, Blocks, Columns, Identity, Power, Random
from .parts.rank import AutoRank
from .parts.residuals import Compensated, Drop, GradScaled, NormScaled, StateFree
from .parts.rules import SGDM, Adam, Lion, Muon, NorMuon, Orthogonal, RowColumnScaled
from .parts.types import Site, Update
from .planner import estimate_memory

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    # A bare checkout: there the kernels lie beside this folder, once installed inside it.
    __path__.append(str(_root))  # noqa: F405

__all__ = [
    "DCT", "SGDM", "SVD", "Adam", "AutoRank", "Blocks", "Columns", "Compensated", "Drop",
    "ErrorFeedback", "GeneralErrorFeedback", "GradScaled", "Gradient", "Identity", "Lion",
    "LowRank", "Muon", "NorMuon", "NormScaled", "Orthogonal", "Plan", "Power", "Random",
    "RowColumnScaled", "SettingError", "Site", "StateFree", "Update", "WholeMomentum",
    "__version__", "estimate_memory", "flatten_state", "import_state", "param_groups",
    "predicted_bytes", "projected_all_reduce", "state_bytes", "unflatten_state",
]  # fmt: skip
__all__ += methods.__all__
