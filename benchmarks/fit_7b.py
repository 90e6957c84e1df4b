"""Does LLaMA-7B train on a card of 24 GiB, and on one of 16? Peak memory and tokens a second.

Plans by computation: at each card the largest rank that fits, then the largest batch. Each case is
trained by `fit_case.py` in a process of its own, on a larger GPU whose memory is capped there; a
case of ours that runs out of memory after all is tried again smaller. Rows go to the csv at once,
and cases that it has are not repeated. README.md says what is assumed.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import json
import os
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from fit_case import GIB, METHODS, OURS, SIZES, Case, build_model, cap_bytes
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import lowrank_optim

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "fit_7b.csv"
RANKS, BATCHES, CARDS = (1024, 512, 256, 128), (16, 8, 4, 2, 1), (24, 16)
SPARE = GIB // 4
"""Left free in a plan: for libraries' workspaces, and for what lies between blocks of memory."""
BESIDE = {"dct": 40, "fira": 12}
"""Bytes that a step needs beside, for each value of the matrix' moment: counted on a CPU."""
FIRST = 90.0
"""Seconds for a case before one has been timed: it also compiles the kernels."""
GRACE = 45.0
"""Seconds after the budget until which a case that has been started may go on."""
FIELDS = """size method card rank batch length steps outcome phase message predicted_peak cap_bytes
peak_allocated peak_reserved outside_bytes weight_bytes state_bytes tokens_per_s first_step_s
loss_first loss_last device driver torch transformers triton package commit date""".split()  # noqa: SIM905
DONE = ("trained", "out of memory")
Row = dict[str, Any]


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it that are alive, and the most there were."""

    def __init__(self, known: Iterator[Tensor]) -> None:
        super().__init__()
        self.held = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count the storages that it returns."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return True  # the one question to a meta tensor: is a row one text? It is
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.held:
                    self.held[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.freed, storage._cdata)
        return out

    def freed(self, key: int) -> None:
        """Forget a storage."""
        self.now -= self.held.pop(key)


@functools.cache
def meta_model(size: str) -> Any:
    """Return the model without memory."""
    return build_model(size, "meta")


@functools.cache
def optimizer_bytes(size: str, method: str, rank: int) -> int:
    """Return what the optimizer keeps, with a basis that layers share."""
    model = meta_model(size)
    weights = sum(p.numel() for p in model.parameters())
    if method not in OURS:
        return {"adamw": 4 * weights, "adamw8bit": 2 * weights + weights // 32}[method]
    shared = 4 * SIZES[size]["hidden_size"] ** 2 if method == "dct" else 0
    return lowrank_optim.predicted_bytes(METHODS[method](model, rank)) + shared


@functools.cache
def training_bytes(size: str, method: str, rank: int, batch: int, length: int) -> int:
    """Return the most that forward and backward pass hold at a time, gradients and steps included.

    On the meta device. Where gradients are freed, two layers are run, and each of the others adds
    what checkpointing keeps of it.
    """
    layers = SIZES[size]["num_hidden_layers"]
    kept = 2 if rank else layers
    model, hidden = meta_model(size), SIZES[size]["hidden_size"]
    whole = model.model.layers
    model.model.layers = nn.ModuleList(whole[:kept])
    model.config.num_hidden_layers = kept

    def step(param: nn.Parameter) -> None:
        rows = max(param.shape) if param.ndim == 2 and param.shape[0] != model.vocab_size else 0
        torch.empty(BESIDE[method] * rows * rank, dtype=torch.uint8, device="meta")
        param.grad = None

    hooks = [p.register_post_accumulate_grad_hook(step) for p in model.parameters() if rank]
    tokens = torch.zeros(batch, length, dtype=torch.long, device="meta")
    with Live(model.parameters()) as live:
        model(input_ids=tokens, labels=tokens).loss.backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    model.model.layers, model.config.num_hidden_layers = whole, layers
    return live.peak + (layers - kept) * 2 * batch * length * hidden


def predicted_peak(case: Case) -> int:
    """Return weights, states, and what training holds beside; from shapes, nothing measured."""
    weights = sum(p.numel() * p.element_size() for p in meta_model(case.size).parameters())
    states = optimizer_bytes(case.size, case.method, case.rank)
    beside = training_bytes(case.size, case.method, case.rank, case.batch, case.length)
    return weights + states + beside


def fits(case: Case) -> bool:
    """Return whether it should fit the card."""
    return predicted_peak(case) + SPARE <= cap_bytes(case.card)


def planned(method: str, card: int) -> Case:
    """Return the case with the largest rank that fits at batch 1, and then the largest batch."""
    smallest = Case("7b", method, card, RANKS[-1], 1)
    rank = next((r for r in RANKS if fits(smallest._replace(rank=r))), RANKS[-1])
    case = smallest._replace(rank=rank)
    return next((c for b in BATCHES if fits(c := case._replace(batch=b))), case)


def smaller(case: Case) -> list[Case]:
    """Return what to try where one of ours did not fit: half the batch, or else half the rank."""
    if case.method in OURS and case.batch > 1:
        return [case._replace(batch=case.batch // 2)]
    return [case._replace(rank=case.rank // 2)] if case.rank > RANKS[-1] else []


def cases(tiny: bool) -> list[Case]:
    """Return what is to be trained, what matters most first."""
    if tiny:
        return [Case("tiny", m, 0, 16 * (m in OURS), 2, length=32, steps=4) for m in METHODS]
    ours = [planned(method, card) for card in CARDS for method in OURS]
    theirs = [Case("7b", m, card, 0, 1) for card in CARDS for m in METHODS if m not in OURS]
    free = [Case("7b", m, 0, 0, BATCHES[0]) for m in METHODS if m not in OURS]
    single = [case._replace(batch=1) for case in ours if case.batch > 1]
    return [*ours, *theirs[:2], *free, *theirs[2:], *single]


def key_of(row: Row) -> tuple[str, ...]:
    """Return what tells rows apart."""
    return tuple(str(row[name]) for name in Case._fields)


def load(path: Path) -> dict[tuple[str, ...], Row]:
    """Return the rows of a csv, if there is one."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {key_of(row): row for row in csv.DictReader(file)}


def save(rows: dict[tuple[str, ...], Row], path: Path) -> None:
    """Write all rows, so that a run that is cut short keeps what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".new")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
    unfinished.replace(path)


def train(case: Case, limit: float) -> Row:
    """Run a case in a process of its own, for so many seconds at most."""
    command = [sys.executable, str(HERE / "fit_case.py"), json.dumps(case._asdict())]
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"outcome": "failed", "message": f"stopped after {limit:.0f} s"}
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        said = " ".join(done.stderr.split())[-300:]
        return {"outcome": "failed", "message": f"exit status {done.returncode}: {said}"}


def facts() -> Row:
    """Return what is the same in all rows of a run."""
    head = output("git", "rev-parse", "--short", "HEAD") or "unknown"
    changed = head != "unknown" and output("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "transformers": release("transformers"),
        "triton": release("triton"),
        "package": lowrank_optim.__version__,
        "commit": f"{head}+" if changed else head,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def output(*command: str) -> str:
    """Return what a command prints; nothing if it fails or is not there."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def release(name: str) -> str:
    """Return the version of a package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def line(row: Row) -> str:
    """Return a row in short, memory in GiB."""
    names = ("predicted_peak", "cap_bytes", "peak_allocated", "peak_reserved", "state_bytes")
    sizes = [f"{int(row[n]) / GIB:8.2f}" if row.get(n) else f"{'-':>8}" for n in names]
    card = f"{row['card']} GiB" if int(row["card"]) else "no cap"
    end = " ".join(filter(None, (row.get("outcome"), row.get("phase"), row.get("message"))))
    if end == "trained":
        end = "{tokens_per_s} tokens/s, loss {loss_first} to {loss_last}".format(**row)
    return f"{row['method']:<9} {card:<7}{row['rank']:>5}{row['batch']:>6}{''.join(sizes)}  {end}"


def main(arguments: list[str] | None = None, run: Callable[[Case, float], Row] = train) -> int:
    """Run the cases that the csv lacks, as far as the budget goes; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="the csv to add to")
    parser.add_argument("--budget", type=float, default=540, help="seconds (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, no caps; on a CPU too")
    parser.add_argument("--plan", action="store_true", help="only print what was computed")
    args = parser.parse_args(arguments)
    start, longest = time.perf_counter(), 0.0
    print("method    card    rank batch    plan     cap   alloc. reserved  state, in GiB")
    waiting, rows, same = cases(args.tiny), load(args.out), facts()
    failed = 0
    while waiting:
        case = waiting.pop(0)
        row: Row = {**case._asdict(), "predicted_peak": predicted_peak(case)}
        if args.plan:
            print(line({**row, "cap_bytes": cap_bytes(case.card)}))
            continue
        known = rows.get(key_of(row))
        if known is not None and known["outcome"] in DONE:
            row = known
        else:
            begun = time.perf_counter()
            left = args.budget - (begun - start)
            if (1.3 * longest or FIRST) > left:
                print(f"left out, for want of time: {case.method} {case.card} {case.batch}")
                continue
            row |= same | run(case, left + GRACE)
            longest = max(longest, time.perf_counter() - begun)
            rows[key_of(row)] = row
            save(rows, args.out)
        print(line(row), flush=True)
        failed += row["outcome"] == "failed"
        if row["outcome"] == "out of memory":
            waiting[:0] = smaller(case)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
