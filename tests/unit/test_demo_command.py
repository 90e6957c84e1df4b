"""The command `demo` around its training: what is checked before, and what is left behind."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest

from helpers.demo_runs import make_run
from lowrank_optim import cli
from lowrank_optim.demo import train as training
from lowrank_optim.demo.corpus import load_corpus
from lowrank_optim.demo.recipes import RECIPES
from lowrank_optim.demo.train import Point

TEXT = "The quick brown fox jumps over the lazy dog.\n" * 400


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def limit():
    """A function that sets the largest file that can be written, in bytes: a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def trained(monkeypatch):
    """Put a stub in the place of training, and list what it was asked for.

    Its attribute `then` is called before it returns, with the number of methods so far.
    """

    class Calls(list):
        then = staticmethod(lambda count: None)

    calls = Calls()

    def stub(recipe, corpus, settings, on_step):
        calls.append(recipe.name)
        calls.then(len(calls))
        steps = settings.steps
        on_step(steps, 2.0)
        return make_run(recipe.name, curve=(Point(0, None, 5.0), Point(steps, 3.0, 2.0)))

    monkeypatch.setattr(training, "train", stub)
    monkeypatch.setattr(training, "warm_up", lambda *given: None)
    return calls


def demo(corpus, out, *given):
    return cli.main(
        ["demo", "--methods", "adamw,galore", "--corpus", str(corpus), "--out", str(out), *given]
    )


def rows(out):
    return [row["name"] for row in json.loads((out / "demo.json").read_text())["rows"]]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--rank", "192"], "no parameter of LlamaForCausalLM would be projected"),
        (["--rank", str(2**80)], "would be projected"),
        (["--rank", "300", "--methods", "muon"], "would be projected"),
        (["--methods", "galor"], "unknown method 'galor'; did you mean galore?"),
        (["--methods", "all,dct"], "unknown method 'all'"),
        (["--corpus", "nowhere"], "no corpus at nowhere"),
        (["--corpus", "/dev/null"], "Not a directory"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_before_training(given, said, trained, corpus, tmp_path, capsys):
    assert demo(corpus, tmp_path / "new" / "out", *given) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert not trained
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("rank", [1, 191, 0.001, 1.0])
def test_ranks_that_can_be_trained_pass_the_check(rank):
    training.check(list(RECIPES.values()), training.Settings(rank=rank, layers=1))


@pytest.mark.parametrize("name", ["out", "out/deep", "demo.json"])
def test_a_folder_that_takes_no_results_is_said_before_training(
    name, trained, corpus, tmp_path, capsys
):
    if name == "demo.json":
        out = tmp_path
        (tmp_path / name).mkdir()
    else:
        out = tmp_path / name
        (tmp_path / "out").write_text("a file")
    before = sorted(tmp_path.iterdir())
    assert demo(corpus, out) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"lowrank-optim: --out: cannot write to {out}: ")
    assert said.count("\n") == 1
    assert not trained
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_is_seen_before_training(trained, corpus, tmp_path, capsys, limit):
    out = tmp_path / "new" / "out"
    limit(4096)
    assert demo(corpus, out) == 2
    said = capsys.readouterr().err
    assert said == f"lowrank-optim: --out: cannot write to {out}: File too large\n"
    assert not trained
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fills_up_keeps_what_was_written(trained, corpus, tmp_path, capsys, limit):
    """The second method's numbers do not fit: those of the first stay, and both are shown."""
    trained.then = lambda count: limit(64) if count == 2 else None
    assert demo(corpus, tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert f"cannot write {tmp_path / 'out' / 'demo.json'}: File too large" in printed.err
    assert "GaLore" in printed.out
    assert "nats/byte" in printed.out
    assert os.listdir(tmp_path / "out") == ["demo.json"]
    assert rows(tmp_path / "out") == ["adamw"]


def test_without_room_for_the_picture_the_numbers_stand(trained, corpus, tmp_path, capsys, limit):
    trained.then = lambda count: limit(2**14)
    assert demo(corpus, tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert "demo.png: File too large\n" in printed.err
    assert os.listdir(tmp_path / "out") == ["demo.json"]
    assert rows(tmp_path / "out") == ["adamw", "galore"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_ends_a_run_leaves_what_is_done(error, trained, corpus, tmp_path, capsys):
    def stop(count):
        if count == 2:
            raise error

    trained.then = stop
    if error is KeyboardInterrupt:
        assert demo(corpus, tmp_path / "out") == 130
    else:
        with pytest.raises(error):  # no mistake of the user: its traceback is wanted
            demo(corpus, tmp_path / "out")
    printed = capsys.readouterr()
    assert printed.err == ("lowrank-optim: stopped\n" if error is KeyboardInterrupt else "")
    assert "AdamW" in printed.out
    assert sorted(os.listdir(tmp_path / "out")) == ["demo.json", "demo.png"]
    assert rows(tmp_path / "out") == ["adamw"]


def test_ctrl_c_in_the_first_method_leaves_no_file(trained, corpus, tmp_path, capsys):
    def stop(count):
        raise KeyboardInterrupt

    trained.then = stop
    assert demo(corpus, tmp_path / "out") == 130
    assert capsys.readouterr().err == "lowrank-optim: stopped\n"
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"co$t^{x_$", "co$t^{x_$"),
        (b"n\xff", "n\N{REPLACEMENT CHARACTER}"),
        (b"[/x] [bold] :warning:", "[/x] [bold] :warning:"),
        (b"a\nb\x1b[31m", "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}[31m"),
    ],
    ids=str,
)
def test_names_are_shown_as_they_are(name, shown, trained, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    given, out = (Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), part + name)))
                  for part in (b"", b"out "))  # fmt: skip
    given.parent.mkdir(exist_ok=True)
    corpus.rename(given)
    last = shown.rpartition("/")[2]
    assert demo(given, out) == 0
    printed = capsys.readouterr()
    assert json.loads((out / "demo.json").read_text())["conditions"]["corpus"] == last
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert f"{last}, torch" in printed.out
    assert f"out {shown}/demo.json" in printed.out


def test_a_corpus_that_cannot_be_read_says_why(corpus, monkeypatch):
    folder = corpus.parent
    (folder / "other.txt").write_text(TEXT + "another\n")
    (folder / "third.txt").write_text(TEXT + "one more\n")

    def refuse(path, *mode):
        if path == corpus:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *mode)

    real = Path.open
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied: '.*text\.txt'"):
        load_corpus(corpus)
    read = load_corpus(folder)  # a file among others is left out
    assert sorted(read.train_files + read.validation_files) == ["other.txt", "third.txt"]
