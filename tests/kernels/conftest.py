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
