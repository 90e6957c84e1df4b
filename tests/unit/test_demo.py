"""The demo: its corpus, its measurements, and what the command leaves behind."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from helpers.demo_runs import make_run
from lowrank_optim import cli
from lowrank_optim.demo import report
from lowrank_optim.demo.corpus import Corpus, Document, load_corpus, split
from lowrank_optim.demo.recipes import RECIPES, build_optimizer, choose
from lowrank_optim.demo.train import (
    Point,
    Settings,
    batches,
    build_model,
    evaluate,
    rate,
    train,
    validation_windows,
)

TINY = Settings(
    steps=4, batch=3, length=32, rank=8, hidden=32, intermediate=48, layers=1, heads=2, windows=8
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty texts of 700 to 3600 bytes in two levels, each with a line no other has."""
    root = tmp_path / "texts"
    (root / "deep").mkdir(parents=True)
    for place in range(30):
        text = "".join(f"file {place} line {line}\n" for line in range(50 + 6 * place))
        (root / ("deep" if place % 2 else "") / f"{place}.txt").write_text(text)
    return root


def contents(corpus: Corpus) -> tuple[bytes, bytes]:
    return bytes(corpus.train.tolist()), bytes(corpus.validation.tolist())


def rendered(found: dict[str, object], width: int = 120) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(report.table(found))
    return captured.get()


def test_folder_is_split_by_file_without_leakage(folder: Path) -> None:
    corpus = load_corpus(folder)
    training, held = contents(corpus)
    assert len(corpus.train_files) + len(corpus.validation_files) == 30
    for names, inside, outside in (
        (corpus.train_files, training, held),
        (corpus.validation_files, held, training),
    ):
        for name in names:
            whole = (folder / name).read_bytes()
            assert whole in inside
            assert whole.splitlines()[0] + b"\n" not in outside
    assert 0.05 < len(held) / (len(held) + len(training)) <= 0.1
    again = load_corpus(folder)
    assert contents(again) == (training, held)


def test_tuning_never_reads_what_the_demo_validates_on(folder: Path) -> None:
    demo, tuning = load_corpus(folder), load_corpus(folder, tuning=True)
    assert set(tuning.train_files) | set(tuning.validation_files) == set(demo.train_files)
    assert not set(tuning.train_files) & set(tuning.validation_files)
    assert tuning.validation_files


def test_single_file_holds_its_last_tenth_out(tmp_path: Path) -> None:
    data = bytes(byte % 251 + 1 for byte in range(20_000))
    (tmp_path / "one.txt").write_bytes(data)
    assert contents(load_corpus(tmp_path / "one.txt")) == (data[:18_000], data[18_000:])


def test_binary_and_repeated_files_are_left_out(folder: Path) -> None:
    before = load_corpus(folder)
    (folder / "image.bin").write_bytes(b"\x89PNG\0" * 1000)
    (folder / "copy.txt").write_bytes((folder / "0.txt").read_bytes())
    after = load_corpus(folder)
    names = {*after.train_files, *after.validation_files}
    assert "image.bin" not in names
    assert len({"copy.txt", "0.txt"} & names) == 1
    assert sum(map(len, contents(after))) == sum(map(len, contents(before)))


def test_a_file_larger_than_the_share_still_leaves_something_to_validate_on() -> None:
    documents = [Document("a", b"a" * 900), Document("b", b"b" * 500)]
    held, rest = split(documents)
    assert [text.name for text in held] == ["b"]
    assert [text.name for text in rest] == ["a"]


def test_default_corpus_is_library_source_without_tests() -> None:
    corpus = load_corpus()
    names = corpus.train_files + corpus.validation_files
    assert all(name.endswith(".py") for name in names)
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    share = corpus.validation.numel() / (corpus.train.numel() + corpus.validation.numel())
    assert 0.095 < share <= 0.1


def test_corpus_errors_name_the_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no corpus at .*nowhere"):
        load_corpus(tmp_path / "nowhere")
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ValueError, match=r"too little text in .*short\.txt"):
        load_corpus(tmp_path / "short.txt")
    with pytest.raises(ValueError, match="too little text"):
        load_corpus(tmp_path)


class Fixed(nn.Module):
    """Predicts byte 1 with probability 0.7 and byte 2 with 0.2, whatever came before."""

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        odds = torch.full((256,), 0.1 / 254)
        odds[1], odds[2] = 0.7, 0.2
        return SimpleNamespace(logits=odds.log().expand(*input_ids.shape, 256))


@pytest.mark.parametrize("batch", [1, 2, 4, 5, 8])
def test_evaluation_is_a_mean_over_bytes_for_any_batch(batch: int) -> None:
    windows = torch.ones(5, 4, dtype=torch.long)
    windows[4] = 2
    expected = -(4 * math.log(0.7) + math.log(0.2)) / 5
    assert evaluate(Fixed(), windows, batch) == pytest.approx(expected, rel=1e-6)


def test_validation_windows_predict_no_byte_twice() -> None:
    data = torch.arange(101, dtype=torch.uint8)
    assert validation_windows(data, 10, 99)[:, 1:].flatten().tolist() == list(range(1, 101))
    few = validation_windows(data, 10, 3)
    assert few[:, 0].tolist() == [0, 40, 90]


def test_batches_depend_on_the_seed_alone_and_reach_both_ends() -> None:
    data = torch.arange(40, dtype=torch.uint8)
    drawn = torch.stack(list(batches(data, replace(TINY, steps=50))))
    assert drawn.shape == (50, 3, 33)
    assert torch.equal(drawn[..., 1:] - drawn[..., :-1], torch.ones(50, 3, 32, dtype=torch.long))
    assert (drawn.min(), drawn.max()) == (0, 39)
    assert torch.equal(drawn, torch.stack(list(batches(data, replace(TINY, steps=50)))))
    other = torch.stack(list(batches(data, replace(TINY, steps=50, seed=1))))
    assert not torch.equal(drawn, other)


def test_rate_warms_up_then_falls_to_a_tenth() -> None:
    rates = [rate(step, 150) for step in range(150)]
    assert rates[0] == pytest.approx(1 / 15)
    assert rates[14] == rates[15] == 1
    assert rates[15:] == sorted(rates[15:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert rate(0, 1) == 1


def test_every_recipe_splits_the_model_the_same_way_with_its_own_rates() -> None:
    model = build_model(TINY)
    splits = []
    for recipe in RECIPES.values():
        optimizer = build_optimizer(recipe, model, rank=8, steps=4, seed=0)
        groups = optimizer.param_groups
        assert groups[0]["lr"] == recipe.lr
        assert {group["lr"] for group in groups[1:]} == {recipe.rest_lr}
        assert groups[0]["betas"] == recipe.betas
        assert all(group["betas"] == (0.9, 0.999) for group in groups[1:])
        splits.append(
            [([id(p) for p in group["params"]], group["weight_decay"]) for group in groups]
        )
    assert all(other == splits[0] for other in splits)
    assert sum(len(parameters) for parameters, _ in splits[0]) == len(list(model.parameters()))


def test_training_repeats_and_all_methods_start_alike(folder: Path) -> None:
    corpus = load_corpus(folder)
    first = {name: train(recipe, corpus, TINY) for name, recipe in RECIPES.items()}
    for name, recipe in RECIPES.items():
        again = train(recipe, corpus, TINY)
        assert again.curve == first[name].curve
        assert again.validation_loss == first[name].validation_loss
    assert len({run.curve[0] for run in first.values()}) == 1
    assert len({run.curve[1].train for run in first.values()}) == 1
    assert len({run.validation_loss for run in first.values()}) == len(first)
    assert all(
        run.state_bytes < first["adamw"].state_bytes
        for name, run in first.items()
        if name not in ("adamw", "conda")  # whose states are as large as AdamW's, and bases besides
    )
    assert all(run.validation_loss < run.curve[0].validation for run in first.values())
    other = train(RECIPES["adamw"], corpus, replace(TINY, seed=1))
    assert other.curve[0] != first["adamw"].curve[0]


@pytest.mark.slow
def test_command_writes_what_it_shows(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    out = tmp_path / "new" / "out"
    given = ["--steps", "4", "--methods", "adamw, galore", "--corpus", str(folder)]
    assert cli.main(["demo", *given, "--rank", "0.25", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    found = json.loads((out / "demo.json").read_text())
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert str(out / "demo.json") in shown
    assert str(out / "demo.png") in shown

    conditions, (adamw, galore) = found["conditions"], found["rows"]
    assert (conditions["steps"], conditions["rank"], conditions["seed"]) == (4, 0.25, 0)
    assert conditions["parameters"] == 1_869_504
    corpus = load_corpus(folder)
    assert conditions["train_bytes"] == corpus.train.numel()
    assert conditions["validation_bytes"] == corpus.validation.numel()
    tensors = len(list(build_model(Settings()).parameters()))
    assert adamw["state_bytes"] == 2 * 4 * 1_869_504 + 4 * tensors
    assert galore["saved"] == pytest.approx(1 - galore["state_bytes"] / adamw["state_bytes"])
    assert 0.5 < galore["saved"] < 0.75
    assert adamw["saved"] is None
    for row in (adamw, galore):
        assert [point["step"] for point in row["curve"]] == [0, 1, 2, 3, 4]
        assert row["slowest_step_ms"] >= max(row["first_step_ms"], row["step_ms"])
        assert row["training_step_ms"] > row["step_ms"]
        line = next(
            line
            for line in shown.splitlines()
            if line.strip().startswith(row["label"]) and "step" not in line
        )
        for value in (
            f"{row['validation_loss']:.3f}",
            f"{row['state_mib']:.2f}",
            f"{row['step_ms']:.1f}",
            f"{row['first_step_ms']:.1f}",
            f"{row['slowest_step_ms']:.1f}",
            "-" if row["saved"] is None else f"{row['saved']:.0%}",
        ):
            assert value in line.split()


def test_table_fits_80_columns_and_invents_nothing(folder: Path) -> None:
    corpus = load_corpus(folder)
    slow = {"step_ms": 99.9, "first_step_ms": 999.9, "slowest_step_ms": 999.9}
    runs = [make_run(name, lr=1.25e-3, rest_lr=1.25e-2, **slow) for name in RECIPES]
    text = rendered(report.results(runs, corpus, TINY), width=80)
    assert "…" not in text
    assert all(recipe.label in text for recipe in RECIPES.values())

    alone = report.results([make_run("galore", validation_loss=math.nan)], corpus, TINY)
    line = next(line for line in rendered(alone).splitlines() if "GaLore" in line)
    assert "%" not in line
    assert {"-", "diverged"} <= set(line.split())
    assert alone["rows"][0]["validation_loss"] is None


def test_figure_survives_a_method_that_diverged(folder: Path, tmp_path: Path) -> None:
    runs = [
        make_run("adamw"),
        make_run("fira", curve=(Point(0, None, math.nan), Point(4, math.inf, math.nan))),
    ]
    found = report.results(runs, load_corpus(folder), TINY)
    numbers, picture = report.write(found, tmp_path)
    assert json.loads(numbers.read_text())["rows"][1]["curve"][1]["train"] is None
    assert picture.stat().st_size > 10_000


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("last", [2.5, 9.0, 1e4])
def test_figure_names_curves_that_end_above_the_start(
    folder: Path, tmp_path: Path, last: float
) -> None:
    """Their names stay inside the figure; matplotlib warns where its layout has no room left."""
    climbing = (Point(0, None, 5.5), Point(1, 5.0, 2.0), Point(4, 5.0, last))
    found = report.results(
        [make_run("adamw"), make_run("apollo", curve=climbing)], load_corpus(folder), TINY
    )
    report.write(found, tmp_path)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--methods", "adamw,sgd"], "unknown method 'sgd'; choose among adamw, galore, dct"),
        (["--methods", "dct,dct"], "method 'dct' is given twice"),
        (["--methods", ","], "no method given; choose among adamw"),
        (["--corpus", "/nowhere/at/all"], "no corpus at /nowhere/at/all"),
        (["--out", "/dev/null/x"], "/dev/null"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", *given]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("given", ["0", "-3", "1.5", "0.0", "many", "nan"])
def test_impossible_ranks_are_refused(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", "--rank", given])
    assert stopped.value.code == 2
    assert f"'{given}' is neither a number of columns nor a share" in capsys.readouterr().err


def test_ranks_are_columns_or_shares() -> None:
    parse = cli.build_parser().parse_args
    ranks = [parse(["demo", "--rank", text]).rank for text in ("48", "1", "1.0", "0.25")]
    assert [(type(rank), rank) for rank in ranks] == [
        (int, 48),
        (int, 1),
        (float, 1.0),
        (float, 0.25),
    ]


def test_defaults_of_the_command_are_those_of_the_settings() -> None:
    args = cli.build_parser().parse_args(["demo"])
    assert (args.steps, args.rank, args.seed) == (Settings.steps, Settings.rank, Settings.seed)
    assert choose(args.methods.split(",")) == list(RECIPES.values())[:6]
    assert choose(["all"]) == list(RECIPES.values())


def test_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == (
        "lowrank-optim: transformers and rich and matplotlib missing: "
        'pip install "lowrank-optim[demo]"\n'
    )


@pytest.mark.parametrize("given", [["--help"], ["demo", "--help"], ["--version"]])
def test_help_needs_no_extra(given: list[str]) -> None:
    program = (
        "import sys\n"
        "from lowrank_optim.cli import main\n"
        "try:\n"
        f"    main({given!r})\n"
        "except SystemExit as stopped:\n"
        "    assert stopped.code == 0, stopped.code\n"
        "loaded = {'transformers', 'rich', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {loaded}' if loaded else 0)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "lowrank-optim" in ran.stdout
