"""One source for what to cite: the command, CITATION.cff and the README agree with it."""

from __future__ import annotations

import inspect
import re

import pytest
import yaml

import lowrank_optim
from helpers.places import ROOT
from lowrank_optim import Power, cli
from lowrank_optim import methods as presets
from lowrank_optim._version import __released__
from lowrank_optim.methods import papers as citations

README = (ROOT / "README.md").read_text()
CFF = yaml.safe_load((ROOT / "CITATION.cff").read_text())
SOURCE = re.compile(r"\d{4}\.\d{4,5}|https://\S+/")


def entries(text):
    """The BibTeX entries of a text, by their keys."""
    return {
        entry[1]: entry[0] for entry in re.finditer(r"^@\w+\{(\w+),\n.*?^\}\n", text, re.M | re.S)
    }


def fields(entry):
    return dict(re.findall(r"^  (\w+) += \{(.*)\},$", entry, re.M))


def cite(capsys, *names):
    status = cli.main(["cite", *names])
    return status, *capsys.readouterr()


def test_every_class_is_cited_by_the_papers_of_its_docstring():
    classes = {
        name: cls
        for name, cls in inspect.getmembers(presets, inspect.isclass)
        if cls.__module__.startswith(presets.__name__)
    }
    named = {what: keys for what, keys in citations.METHODS.values() if what in classes}
    assert set(named) == set(classes)
    for name, cls in classes.items():
        _, _, reference = cls.__doc__.partition("Reference:")
        papers = [paper for paper in citations.PAPERS if paper.key in named[name]]
        cited = {paper.arxiv or paper.page for paper in papers}
        said, of_power = (set(SOURCE.findall(text)) for text in (reference, Power.__doc__))
        assert said
        assert said <= cited <= said | of_power, name


def test_papers_are_complete_and_each_belongs_to_a_name():
    keys = [paper.key for paper in citations.PAPERS]
    assert len(set(keys)) == len(keys)
    assert {key for _, used in citations.METHODS.values() for key in used} == set(keys)
    for paper in citations.PAPERS:
        assert SOURCE.fullmatch(paper.arxiv or paper.page)
        assert paper.key.startswith(f"{paper.authors[0].partition(',')[0].lower()}{paper.year}")
        for author in paper.authors:
            assert re.fullmatch(r"[^,]+, [^,]+", author), author


@pytest.mark.parametrize("name", citations.METHODS)
def test_the_command_prints_the_papers_and_this_package(name, capsys):
    status, out, _ = cite(capsys, name)
    assert status == 0
    assert list(entries(out)) == [*(p.key for p in citations.papers(name)), "lowrank_optim"]
    assert out.isascii()
    for entry in entries(out).values():
        assert entry.count("{") == entry.count("}")
        assert {"title", "author", "year"} <= set(fields(entry))


def test_several_names_give_each_paper_once_and_classes_stand_for_methods(capsys):
    _, out, _ = cite(capsys, "Fira", "GaLoreAdamW", "fira")
    assert list(entries(out)) == ["chen2025fira", "zhao2024galore", "lowrank_optim"]


def test_accents_are_written_for_bibtex(capsys):
    _, out, _ = cite(capsys, "frugal")
    assert r"Tak{\'a}{\v c}, Martin and Horv{\'a}th, Samuel" in out


@pytest.mark.parametrize("given", [[], ["--list"], ["--list", "fira"]])
def test_without_a_name_it_says_which_there_are(given, capsys):
    status, out, _ = cite(capsys, *given)
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == list(citations.METHODS)


@pytest.mark.parametrize(
    ("given", "said"),
    [("galor", "did you mean galore?"), ("zzz", "there are lowrank, galore, dct")],
)
def test_an_unknown_name_is_one_line_and_prints_no_entry(given, said, capsys):
    status, out, err = cite(capsys, "fira", given)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert f"'{given}'" in err
    assert said in err


def test_citation_cff_says_the_same():
    assert CFF["cff-version"] == "1.2.0"
    assert CFF["version"] == lowrank_optim.__version__
    assert CFF["date-released"].isoformat() == __released__
    assert CFF["title"] == citations.TITLE
    assert CFF["authors"] == [{"name": citations.AUTHORS}]
    found = [
        (
            entry["title"],
            tuple(f"{who['family-names']}, {who['given-names']}" for who in entry["authors"]),
            entry["year"],
            entry["url"],
            entry.get("conference", {}).get("name", ""),
            entry.get("journal", ""),
            entry["type"],
        )
        for entry in CFF["references"]
    ]
    assert found == [
        (p.title, p.authors, p.year, p.url, "", p.venue, "article")
        if p.journal or not p.venue
        else (p.title, p.authors, p.year, p.url, p.venue, "", "conference-paper")
        for p in citations.PAPERS
    ]


def test_the_readme_has_every_entry_as_the_command_prints_it():
    blocks = re.findall(r"^```bibtex\n(.*?)^```", README, re.M | re.S)
    assert entries("\n".join(blocks)) == entries(citations.bibtex(citations.METHODS))
    for names in re.findall(r"^lowrank-optim cite ([^>\n]*)", README, re.M):
        assert citations.bibtex(names.split())
