"""What all commands share: one line for any mistake, whole files or none, names of any bytes."""

from __future__ import annotations

import errno
import json
import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_optim import cli
from lowrank_optim.terminal import CommandError, complain, printable, whole, whole_file


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "required: COMMAND"),
        ([""], "invalid choice: ''"),
        (["train"], "invalid choice: 'train'"),
        (["demo", "--wrong"], "unrecognized arguments: --wrong"),
        (["demo", "a\nb\x1b[31m"], "unrecognized arguments: a b\N{REPLACEMENT CHARACTER}[31m"),
        (["demo", "--steps", "0"], "'0' is not a whole number from 1"),
        (["demo", "--steps", "-3"], "'-3' is not a whole number"),
        (["demo", "--steps", "9" * 5000], "is not a whole number"),
        (["demo", "--steps", "\N{SUPERSCRIPT TWO}"], "is not a whole number"),
        (["demo", "--seed", "-1"], "'-1' is not a whole number from 0"),
        (["demo", "--seed", str(2**63)], "is not a whole number"),
        (["demo", "--seed", "nan"], "'nan' is not a whole number"),
        (["demo", "--rank", "inf"], "'inf' is neither a number of columns nor a share"),
        (["demo", "--rank", "-0.5"], "'-0.5' is neither"),
        (["demo", "--out", ""], "--out: the name is empty"),
        (["demo", "--corpus", " "], "--corpus: the name is empty"),
        (["memory"], "required: --model"),
        (["memory", "--model", ""], "--model: the name is empty"),
        (["memory", "--model", "60m", "--gpu", ""], "--gpu: the name is empty"),
        (["memory", "--model", "60m", "--plot", ""], "--plot: the name is empty"),
        (["memory", "--model", "60m", "--seq", "nan"], "--seq: invalid int value: 'nan'"),
        (["memory", "--model", "60m", "--batch", "1.5"], "--batch: invalid int value"),
        (["memory", "--model", "60m", "--rank", "nan"], "'nan' is neither"),
        (["memory", "--model", "60m", "--rank", "9" * 5000], "is neither"),
        (["memory", "--model", "60m", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["memory", "--model", "60m", "--state", "4bit"], "--state: invalid choice: '4bit'"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_one_line_and_status_2(given, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(given)
    printed = capsys.readouterr()
    assert (stopped.value.code, printed.out) == (2, "")
    assert printed.err.startswith("lowrank-optim: ")
    assert printed.err.count("\n") == 1
    assert said in printed.err
    assert "--help" in printed.err


@given(text=st.text())
def test_any_text_is_printable_in_one_line(text):
    shown = printable(text)
    assert len(shown) == len(text)
    assert shown.isprintable()
    assert shown.encode().decode() == shown
    assert all(
        now in (was, "\N{REPLACEMENT CHARACTER}") for was, now in zip(text, shown, strict=True)
    )


def test_a_complaint_is_one_line_whatever_it_quotes(capsys):
    complain("no file\n 'a\r\n\udcff\x1b[2J'")
    said = capsys.readouterr().err
    assert (
        said == "lowrank-optim: no file 'a \N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}[2J'\n"
    )


@given(value=st.integers(min_value=-(10**12), max_value=10**12))
def test_whole_numbers_are_read_within_their_bounds(value):
    read = whole(3, 10**6)
    if 3 <= value <= 10**6:
        assert read(str(value)) == value
    else:
        with pytest.raises(Exception, match="is not a whole number from 3 to 1000000"):
            read(str(value))


@pytest.mark.parametrize("before", [None, "old"])
def test_a_file_is_written_whole_or_stays_what_it_was(tmp_path, before):
    target = tmp_path / "a.json"
    if before is not None:
        target.write_text(before)

    def broken(error):
        with whole_file(target) as beside:
            beside.write_text("half")
            raise error

    with pytest.raises(CommandError, match=r"cannot write .*a\.json: No space left on device"):
        broken(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(KeyboardInterrupt):
        broken(KeyboardInterrupt())
    assert [path.read_text() for path in tmp_path.iterdir()] == ([] if before is None else ["old"])

    with whole_file(target) as beside:
        beside.write_text("new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


def test_a_folder_in_the_place_of_a_file_stays(tmp_path):
    (tmp_path / "a.json").mkdir()
    with (
        pytest.raises(CommandError, match="cannot write"),
        whole_file(tmp_path / "a.json") as beside,
    ):
        beside.write_text("new")
    assert [path.is_dir() for path in tmp_path.iterdir()] == [True]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("given", [["cite", "fira"], ["cite", "--list"]], ids=str)
def test_what_cannot_be_printed_is_one_line(given, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(given) == 2
        full.flush()  # nothing is left to fail when Python ends
    said = capsys.readouterr().err
    assert said == "lowrank-optim: cannot print: No space left on device\n"


@pytest.mark.parametrize("place", ["lowrank_optim.planner.command", "lowrank_optim.demo.command"])
def test_ctrl_c_is_one_line_and_status_130(place, monkeypatch, capsys):
    def stop(*names, extra):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"{place}.require", stop)
    given = ["demo"] if "demo" in place else ["memory", "--model", "60m"]
    assert cli.main(given) == 130
    assert capsys.readouterr().err == "lowrank-optim: stopped\n"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--plot", "none/x.png"], "there is no folder none"),
        (["--plot", "x.xyz"], "x.xyz must end in one of .png, .pdf"),
        (["--plot", "x"], "x must end in one of .png"),
        (["--plot", "."], ". is a folder"),
        (["--gpu", "24XB"], "unknown card '24XB'"),
        (["--gpu", "0GiB"], "a card of '0GiB'"),
        (["--gpu", "9" * 400 + "GB"], "at most 1024 TiB"),
        (["--gpu", "2000000GiB"], "at most 1024 TiB"),
        (["--optimizer", ""], "unknown method ''"),
        (["--optimizer", "Galore"], "unknown method 'Galore': did you mean galore?"),
        (["--optimizer", "all,dct"], "unknown method 'all'"),
        (["--seq", "-1"], "seq=-1: seq must be an int of at least 1"),
        (["--seq", str(10**30)], "cannot be run without values"),
        (["--rank", str(10**30)], "would be projected"),
    ],
    ids=str,
)
def test_what_memory_cannot_do_is_said_before_it_prints(given, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["memory", "--model", "60m", "--seq", "8", *given]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert said in printed.err
    assert not list(tmp_path.iterdir())


def test_a_card_may_be_too_large_for_any_batch_to_fill(capsys):
    """Bytes of 2**20 sequences go beyond int64 here; the answer is the largest batch, not less."""
    given = ["--seq", str(10**7), "--gpu", "1048576GiB", "--optimizer", "adamw", "--json"]
    assert cli.main(["memory", "--model", "60m", *given]) == 0
    (row,) = json.loads(capsys.readouterr().out)["methods"]
    assert 1 < row["largest_batch"] < 2**20
