"""Where the kernels run: on a CUDA device if there is one, else interpreted on the CPU."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from helpers.ranks import Ranks

torch.set_num_threads(1)
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if "long" in item.keywords:
            item.add_marker("slow")
    if HAS_GPU:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where a kernel is tested: interpreted on the CPU, or compiled on a GPU."""
    if request.param == "cpu" and HAS_GPU:
        pytest.skip("there is a GPU: kernels are compiled, not interpreted")
    return request.param


@pytest.fixture(scope="session")
def ranks():
    """Processes that form a group for a call; see `ranks.Ranks.run`."""
    pool = Ranks()
    yield pool
    pool.close()
