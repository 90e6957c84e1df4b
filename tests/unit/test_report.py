"""What the documents say of the results is what the results say."""

import importlib
import re
import shutil
import sys

import pytest

from helpers.places import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
report = importlib.import_module("report")
NUMBER = re.compile(r"(?<=[ .])\d(?=\d* )")


@pytest.fixture
def copy(tmp_path):
    """The documents and their figures, free to be changed."""
    for name in report.DOCS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "docs").mkdir(exist_ok=True)
    for name in report.figures.FIGURES:
        shutil.copy(ROOT / "docs" / name, tmp_path / "docs" / name)
    return tmp_path


def test_documents_and_results_agree():
    assert report.main(["--check"]) == 0


@pytest.mark.parametrize("name", list(report.DOCS)[:1])
def test_a_number_that_was_changed_is_found_and_made_right(copy, name, capsys):
    path = copy / name
    right = path.read_text()
    block = report.BLOCK.search(right)
    assert block, f"{name} has no block of results"
    wrong = NUMBER.sub(lambda digit: str((int(digit.group()) + 1) % 10), block.group(), count=1)
    assert wrong != block.group()
    path.write_text(right.replace(block.group(), wrong))
    assert report.main(["--check", "--root", str(copy)]) == 1
    assert f"{name}: not what the results say" in capsys.readouterr().out
    assert path.read_text() != right
    assert report.main(["--root", str(copy)]) == 0
    assert path.read_text() == right


def test_a_result_that_was_changed_is_found(copy, tmp_path, capsys):
    """One loss of the first final run that is shown; text and figure both notice."""
    ledger = report.Ledger(report.RESULTS)
    results = tmp_path / ledger.path.name
    shutil.copy(ledger.curves, tmp_path / ledger.curves.name)
    lines = ledger.path.read_text().splitlines(keepends=True)
    place = next(k for k, row in enumerate(lines) if ",final,0," in row)
    loss = ledger.rows()[place - 1]["loss"]
    lines[place] = lines[place].replace(loss, f"{float(loss) + 1:.5f}")
    results.write_text("".join(lines))
    assert report.main(["--check", "--root", str(copy), "--results", str(results)]) == 1
    assert "not what the results say" in capsys.readouterr().out


def test_a_block_without_a_table_is_an_error():
    text = "<!-- report: nothing -->\n<!-- end -->"
    with pytest.raises(KeyError, match="no table 'nothing'"):
        report.filled(text, {}, report.Ledger(report.RESULTS))
