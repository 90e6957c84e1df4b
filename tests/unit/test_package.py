"""The installed wheel: what it holds, what it needs, and what importing it costs."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import zipfile

import pytest

from helpers.cases import PRESETS
from helpers.places import ROOT
from lowrank_optim import LowRank
from lowrank_optim.methods._common import Common, WithFeed

pytestmark = pytest.mark.slow

OPTIONAL = ["transformers", "rich", "matplotlib", "bitsandbytes", "scipy", "triton", "hypothesis"]
USE = """
import importlib.abc, importlib.machinery, sys
class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {optional}:
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        raise ModuleNotFoundError(f"no {{spec.name}}", name=spec.name)
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Absent())
import lowrank_optim, torch
assert lowrank_optim.__file__.startswith({place!r}), lowrank_optim.__file__
for name in {presets}:
    weight = torch.nn.Parameter(torch.randn(9, 7))
    optimizer = getattr(lowrank_optim, name)([weight], rank=3)
    weight.grad = torch.randn(9, 7)
    optimizer.step()
    assert weight.isfinite().all()
    optimizer.load_state_dict(optimizer.state_dict())
    print(optimizer.summary())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a copy of the sources that git would give."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (found,) = folder.glob("*.whl")
    return found


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"lowrank_optim"}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lowrank_optim").rglob("*.py")}
    assert sources <= set(names)
    kernels = {f"lowrank_optim/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert kernels <= set(names)
    assert "lowrank_optim/py.typed" in names
    assert any(name.endswith("LICENSE") for name in names)


def test_wheel_needs_torch_and_numpy_only(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
    needs = [
        line.partition(": ")[2]
        for line in archive.read(name).decode().splitlines()
        if line.startswith("Requires-Dist") and "extra ==" not in line
    ]
    assert sorted(needs) == ["numpy", "torch>=2.6"]


def test_wheel_works_without_anything_optional(wheel, tmp_path):
    """Unpacked elsewhere, with every optional package made impossible to import."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = USE.format(
        optional=set(OPTIONAL), presets=[cls.__name__ for cls in PRESETS], place=str(tmp_path)
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("% of 63 parameters projected") == len(PRESETS)


IMPORT = """
import json, sys, time
import torch
before = set(sys.modules)
started = time.process_time()
import lowrank_optim
print(json.dumps([time.process_time() - started, sorted(set(sys.modules) - before)]))
"""


STEP_BY_KERNELS = """
import torch, lowrank_optim, lowrank_optim.kernels
for module in (lowrank_optim, lowrank_optim.kernels):
    assert module.__file__.startswith({place!r}), module.__file__
weight = torch.nn.Parameter(torch.randn(9, 7))
optimizer = lowrank_optim.GaLoreAdamW([weight], rank=3, impl="triton")
weight.grad = torch.randn(9, 7)
optimizer.step()
assert weight.isfinite().all()
"""


@pytest.mark.parametrize("where", ["installed", "checkout"])
def test_kernels_are_found_in_the_wheel_and_in_a_bare_checkout(wheel, tmp_path, where):
    """Once installed they lie inside the package, in a checkout beside it."""
    pytest.importorskip("triton", reason="kernels need triton")
    place = tmp_path / "installed" if where == "installed" else ROOT
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    environment = {**os.environ, "PYTHONPATH": str(place), "TRITON_INTERPRET": "1"}
    code = STEP_BY_KERNELS.format(place=str(place))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_import_is_cheap_and_takes_nothing_along():
    """Under 0.3 s of processor time beyond torch: the best of three, for machines are shared."""
    runs = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, check=True)
        runs.append(json.loads(done.stdout))
    for _, modules in runs:
        assert not {name.partition(".")[0] for name in modules} & set(OPTIONAL)
    assert min(seconds for seconds, _ in runs) < 0.3


def test_version_is_one():
    import lowrank_optim

    done = subprocess.run(
        [sys.executable, "-m", "lowrank_optim.cli", "--version"], capture_output=True, text=True
    )
    assert done.stdout.split() == ["lowrank-optim", lowrank_optim.__version__]
    assert f"version: {lowrank_optim.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {lowrank_optim.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_settings_that_presets_pass_on_are_those_of_the_engine():
    """What a type checker lets through arrives at `LowRank`, once."""
    shared = {*Common.__annotations__, *WithFeed.__annotations__}
    assert shared <= set(inspect.signature(LowRank).parameters)
    for preset in PRESETS:
        assert not shared & set(inspect.signature(preset).parameters)
