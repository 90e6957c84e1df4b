import importlib

import pytest
import torch


@pytest.fixture
def poisoned():
    """What is allocated and not written is nan."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def tall_tiles(monkeypatch):
    """Interpreted, a program of 8-bit moments does several rows: each takes as long as a tile."""
    if not torch.cuda.is_available():
        project = importlib.import_module("lowrank_optim.kernels.project")
        monkeypatch.setattr(project, "HEIGHT", 8)
