"""The pre-training benchmark: texts, search, runs that resume, the ledger, tables and figures."""

import contextlib
import csv
import importlib
import json
import math
import shutil
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.places import BENCHMARKS as FOLDER

sys.path.insert(0, str(FOLDER))

from pretraining import data, methods, runner, search, train, tune
from pretraining.ledger import Ledger, spec_of

pytestmark = pytest.mark.slow

SPEC = methods.Spec("smoke", "lowrank", "final", 0, 12, 3e-3, 1e-2, 0.9, 0.99, gap=5)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder of tokens made from a little text."""
    root = tmp_path_factory.mktemp("text")
    for number in range(120):
        words = " ".join(str(number * place % 97) for place in range(400))
        (root / f"file{number}.md").write_text(f"Text {number}\n{words}\n")
    folder = tmp_path_factory.mktemp("work")
    arrays, manifest = data.prepare([root], 256, 2 << 20)
    arrays["manifest"] = np.frombuffer(json.dumps(manifest).encode(), np.uint8)
    np.savez(folder / "text-256-2.npz", **arrays)
    return folder


def test_splits_are_disjoint_files_and_do_not_depend_on_the_others():
    names = [f"package/module{number}.py" for number in range(2000)]
    counts = {split: sum(data.split_of(name) == split for name in names) for split in data.SPLITS}
    assert sum(counts.values()) == 2000
    assert 15 <= counts["final"] <= 70
    assert 15 <= counts["tune"] <= 70


def test_copies_are_left_out_and_what_is_new_is_kept():
    lines = [f"this is line number {number} of a text".encode() for number in range(40)]
    first, copy = b"\n".join(lines[:20]), b"\n".join(lines[:11] + lines[20:29])
    new = b"\n".join(lines[:9] + lines[20:])
    texts = [("a", first), ("b", first), ("c", copy), ("d", new), ("e", b"short\n" * 9)]
    assert [name for name, _ in data.distinct(texts)] == ["a", "d", "e"]


def test_text_becomes_bytes_or_pieces_that_give_it_back(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="the demo's extra brings it")
    for number in range(60):
        text = "".join(f"value_{number * k % 31} = {k}\n" for k in range(60))
        (tmp_path / f"m{number}.py").write_text(text + "# Grüße\n")
    whole, manifest = data.prepare([tmp_path], 256, 1 << 20)
    pieces, _ = data.prepare([tmp_path], 300, 1 << 20)
    for split in data.SPLITS:
        assert manifest[split]["tokens"] == len(whole[split])
        assert len(pieces[split]) < len(whole[split])
    assert pieces["train"].max() < 300
    again, _ = data.prepare([tmp_path], 300, 1 << 20)
    assert all((again[split] == pieces[split]).all() for split in data.SPLITS)
    assert tokenizers.__version__


@given(st.integers(-30, 10))
def test_grid_goes_there_and_back(place):
    assert search.index(search.value(place)) == place


def follow(searching, loss):
    """Measure what a search wants until it ends."""
    with contextlib.suppress(StopIteration):
        place = next(searching)
        while True:
            place = searching.send(loss(place))


def bowl(place):
    return sum((at - goal) ** 2 for at, goal in zip(place, (-7, -11, 1), strict=True))


@pytest.mark.parametrize("start", [(-12, -8, 2), (-7, -11, 1), (-4, -16, 0)])
def test_search_finds_the_bottom_within_its_points(start):
    done = {}
    follow(search.search(done, start, 40, lambda at: at[2] in range(3)), bowl)
    assert search.best(done) == (-7, -11, 1)
    assert len(done) <= 40
    assert all(place[2] in range(3) for place in done)


def test_search_takes_a_diverged_run_for_no_bottom_and_stops_at_its_points():
    done = {}
    follow(search.search(done, (0, 0), 5), lambda at: 3.0 + sum(at) if any(at) else math.nan)
    assert len(done) == 5
    assert search.best(done) != (0, 0)


def test_descent_goes_down_as_long_as_that_helps():
    done = {(-4, -5, 1): bowl((-4, -5, 1)), (-3, -5, 1): bowl((-3, -5, 1))}
    follow(search.descend(done, 20), bowl)
    assert list(done)[2:] == [
        (-4, -7, 1), (-4, -9, 1), (-4, -11, 1), (-4, -13, 1),
        (-5, -11, 1), (-6, -11, 1), (-7, -11, 1), (-8, -11, 1),
    ]  # fmt: skip
    few = {(-4, -5, 1): bowl((-4, -5, 1))}
    follow(search.descend(few, 3), bowl)
    assert len(few) == 3


@pytest.mark.parametrize(
    "change",
    [{"method": "dct", "gap": 1, "weights": "bfloat16"}, {"state": "8bit"},
     {"change": "on_refresh='rotate', state_free_scale=0.25"}],
    ids=str,
)  # fmt: skip
def test_a_run_that_was_stopped_equals_the_one_left_alone(work, tmp_path, change):
    spec = SPEC._replace(**change)
    folder = tmp_path / "work"
    shutil.copytree(work, folder)
    whole = train.train(spec, "cpu", folder)
    stops = 0
    while True:
        try:
            parts = train.train(spec, "cpu", folder, deadline=time.monotonic())
            break
        except train.OutOfTimeError:
            stops += 1
            assert list(folder.glob("run-*.pt"))
    assert stops == spec.steps - 1
    assert (parts.loss, parts.curve, parts.state) == (whole.loss, whole.curve, whole.state)
    assert not list(folder.glob("run-*"))
    assert math.isfinite(whole.loss)
    assert whole.curve[-1][0] == spec.steps


def test_a_loss_that_is_not_finite_ends_a_run(work):
    result = train.train(SPEC._replace(lr=1e30), "cpu", work)
    assert result.loss == math.inf


def test_the_loss_is_the_mean_over_tokens_whatever_the_batch(work):
    model = train.build_model(train.TASKS["smoke"], 0, "float32", "cpu")
    text = data.load(256, 2 << 20, work)
    held = train.windows(text.splits["train"], 32, 7)
    task = train.TASKS["smoke"]
    means = [train.evaluate(model, held, replace(task, batch=size)) for size in (1, 3, 7)]
    assert max(means) - min(means) < 1e-6


def test_two_seeds_see_other_batches_and_a_step_always_the_same():
    tokens, task = torch.arange(10000, dtype=torch.int32), train.TASKS["smoke"]
    one = train.batch(tokens, task, 0, 5)
    assert torch.equal(one, train.batch(tokens, task, 0, 5))
    assert not torch.equal(one, train.batch(tokens, task, 1, 5))
    assert not torch.equal(one, train.batch(tokens, task, 0, 6))


@pytest.mark.long
def test_everything_end_to_end_and_nothing_twice(work, tmp_path, capsys):
    """Tuning, seeds, the recipe's parts, times, report: what the README's commands do, small."""
    pretrain, house = (importlib.import_module(name) for name in ("pretrain", "house_recipe"))
    results, folder = tmp_path / "pretrain.csv", tmp_path / "work"
    shutil.copytree(work, folder)
    common = ["--task", "smoke", "--results", str(results), "--work", str(folder)]
    command = [
        "tune",
        "final",
        *common,
        "--methods",
        "adamw,lowrank,frugal",
        "--points",
        "2",
        "--seeds",
        "0",
        "1",
    ]
    assert pretrain.main([*command, "--budget", "0"]) == 1
    assert pretrain.main(command) == 0
    rows = Ledger(results).rows()
    assert len(rows) == 3 * (2 + 2)
    assert pretrain.main(command) == 0
    assert len(Ledger(results).rows()) == len(rows)
    assert house.main(["parts", *common, "--changes", "8-bit", "gap 10", "--seeds", "0"]) == 0
    changed = [spec_of(row) for row in Ledger(results).rows()[len(rows) :]]
    assert {spec.state for spec in changed} == {"8bit", "float32"}
    of_frugal = ["--method", "frugal", "--same-rate", "--changes", "power", "--seeds", "0"]
    assert house.main(["parts", *common, *of_frugal]) == 0
    last = map(spec_of, Ledger(results).rows()[len(rows) + len(changed) :])
    assert [(spec.method, spec.change) for spec in last] == [("frugal", "projector='power'")]
    assert "the best of 2" in capsys.readouterr().out
    with results.open(newline="") as file:
        assert {row["threads"] for row in csv.DictReader(file)} == {"1"}
    check_tables(Ledger(results), tmp_path)


def check_tables(ledger, tmp_path):
    tables, figures = (
        importlib.import_module(f"reporting.{name}") for name in ("tables", "figures")
    )
    quality = tables.quality("smoke", 12)(ledger).splitlines()
    labels = [line.split("|")[1].strip() for line in quality[2:5]]
    assert labels == ["AdamW", "FRUGAL", "LowRankAdamW"]
    figure = figures.pretraining("smoke", 12)
    content = figure.content(ledger)
    path = tmp_path / "figure.png"
    assert figures.hash_in(path) == ""
    figures.save(figure, content, path)
    assert figures.hash_in(path) == figures.hash_of(content)
    content["methods"]["adamw"]["losses"][0] += 1e-4
    assert figures.hash_in(path) != figures.hash_of(content)


def test_times_of_all_methods_come_from_one_run(work, tmp_path):
    times = importlib.import_module("pretrain_time")
    path = tmp_path / "time.csv"
    command = ["--task", "smoke", "--rounds", "2", "--work", str(work), "--results", str(path)]
    for _ in range(2):
        assert times.main(command) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == list(methods.METHODS)
    assert all(float(row["step_ms"]) >= float(row["plain_ms"]) > 0 for row in rows)


def test_tuned_rates_are_those_of_one_task_length_and_split(tmp_path):
    ledger = Ledger(tmp_path / "l.csv")
    first = tune.base("smoke", "galore")
    for lr, loss, more in (
        (1e-2, 3.0, {}), (1.7e-2, 2.0, {}), (3e-2, 1.0, {"steps": 24}),
        (5.5e-2, 0.5, {"split": "final"}), (1e-1, 0.1, {"state": "8bit"}),
    ):  # fmt: skip
        spec = first._replace(lr=lr, **more)
        ledger.add(train.Result(spec, loss, [], 1, 1, 0.0, 0, "text"), "cpu", 1, {})
    assert tune.tuned(ledger, first) == (first._replace(lr=1.7e-2), 2.0, 2)
    with pytest.raises(LookupError, match="smoke fira: no rates were tuned"):
        tune.tuned(ledger, tune.base("smoke", "fira"))


def test_what_a_plan_knows_is_not_run(work, tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "l.csv")
    ledger.add(train.Result(SPEC, 1.5, [(12, 2.0, 1.5)], 1, 1, 0.0, 0, "text"), "cpu", 1, {})
    sent = []

    def plan():
        sent.append((yield SPEC))

    assert runner.work_off([plan()], ledger, work, device="cpu", jobs=1)
    assert sent == [1.5]
    assert ledger.curve_of() == {SPEC: [(12, 2.0, 1.5)]}


def test_runs_of_another_text_are_refused(work, tmp_path):
    ledger = Ledger(tmp_path / "l.csv")
    ledger.add(train.Result(SPEC, 1.5, [], 1, 1, 0.0, 0, "other"), "cpu", 1, {})
    with pytest.raises(ValueError, match=r"l.csv has runs of smoke with the text other, here is"):
        runner.work_off(runner.each([SPEC._replace(seed=1)]), ledger, work, device="cpu", jobs=1)
    assert len(ledger.rows()) == 1
    pretrain = importlib.import_module("pretrain")
    with pytest.raises(ValueError, match="with the text other"):
        pretrain.main(
            ["tune", "--task", "smoke", "--results", str(ledger.path), "--work", str(work)]
        )
    assert not (tmp_path / "l_text.json").exists()
