"""A checkpoint of another package that is damaged is refused in one way, or good enough."""

from __future__ import annotations

import copy
import io
import random
import warnings

import pytest
import torch

from helpers.damages import JUNK, TENSORS, damaged, outcome
from helpers.foreign import KEEP, THEIRS, begun, copies, our_optimizer, step
from lowrank_optim import import_state
from lowrank_optim.parts.checks import SettingError


def damaged_projector(saved, rng):
    """Return a copy with something changed in a projector."""
    tree = copy.deepcopy(saved)
    held = vars(rng.choice([s["projector"] for s in tree["state"].values() if "projector" in s]))
    key = rng.choice(["rank", "proj_type", "ortho_matrix"])
    if rng.random() < 0.2:
        del held[key]
        return tree, f"no {key}"
    how = rng.choice([*JUNK, *(TENSORS if key == "ortho_matrix" else ())])
    held[key] = TENSORS[how](held[key], rng) if isinstance(how, str) and how != "x" else how
    return tree, f"{key}: {how!r}"


def fixture_of(name):
    params, theirs = begun(name, 3, torch.float32)

    def build():
        own = copies(params)
        ours = our_optimizer(name, own)
        step(own, ours, 1)
        return list(own.values()), ours

    return build, theirs.state_dict()


@pytest.mark.parametrize("name", THEIRS)
def test_a_damaged_state_is_refused_or_good(name):
    build, saved = fixture_of(name)
    for number in range(60):
        rng = random.Random(f"{name} {number}")
        bad, what = (damaged, damaged, damaged_projector)[number % 3](saved, rng)
        found = outcome(build, lambda ours: import_state(ours, bad, keep=KEEP.get(name, ())))  # noqa: B023
        assert found in ("refused", "taken"), what


@pytest.mark.parametrize("name", ["galore", "fira"])
def test_a_damaged_file_is_refused_or_read(name, tmp_path):
    """Bits of a file may turn into other good numbers: what is read must not raise."""
    build, saved = fixture_of(name)
    file = io.BytesIO()
    torch.save(saved, file)
    path, found = tmp_path / "theirs.pt", set()
    for number in range(30):
        rng, data = random.Random(number), bytearray(file.getvalue())
        if number % 2:
            del data[rng.randrange(len(data)) :]
        else:
            for _ in range(8):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        found.add(outcome(build, lambda ours: import_state(ours, path)))
    assert "refused" in found
    assert found <= {"refused", "taken", "taken, and weights are not finite"}


@pytest.mark.parametrize("name", THEIRS)
def test_an_import_takes_all_numbers_and_warns_of_none(name):
    build, saved = fixture_of(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import_state(build()[1], saved, keep=KEEP.get(name, ()))


@pytest.mark.parametrize("content", [b"", b"hello world\n", bytes(range(256)) * 8], ids=str)
def test_a_file_that_is_none_says_so(content, tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    _, ours = fixture_of("galore")[0]()
    with pytest.raises(SettingError, match=r"x\.pt.*no file of torch\.save, is damaged"):
        import_state(ours, path)


def test_a_file_that_is_not_there_says_so(tmp_path):
    _, ours = fixture_of("galore")[0]()
    with pytest.raises(FileNotFoundError):
        import_state(ours, tmp_path / "none.pt")


SAID = {
    "step below 0": (lambda s: s["state"][1].update(step=-4), "'step' of parameter 0 of group 1"),
    "step as text": (lambda s: s["state"][1].update(step="x"), "'step' of .* is a str"),
    "no step": (lambda s: s["state"][1].pop("step"), r"\(13, 7\), has no 'step'"),
    "no moment": (lambda s: s["state"][1].update(exp_avg=None), "'exp_avg' of .* is a NoneType"),
    "nan": (lambda s: s["state"][1]["exp_avg"].fill_(float("nan")), "'exp_avg' .*must be finite"),
    "below 0": (lambda s: s["state"][1]["exp_avg_sq"].neg_(), "'exp_avg_sq' .*not negative"),
    "no rank": (lambda s: delattr(s["state"][1]["projector"], "rank"), "projector of .* without"),
    "no group": (lambda s: s["param_groups"].__setitem__(0, None), "group 0 of the checkpoint"),
    "no state": (lambda s: s["state"].update({1: None}), "state of parameter 1 is a NoneType"),
    "basis of nan": (
        lambda s: s["state"][1]["projector"].ortho_matrix.fill_(float("nan")),
        "basis of .* must be columns of length 1",
    ),
    "scale": (lambda s: s["param_groups"][1].update(scale="x"), "scale='x' in group 1"),
}


@pytest.mark.parametrize("why", SAID)
def test_the_message_names_what_is_wrong(why):
    change, message = SAID[why]
    build, saved = fixture_of("galore")
    saved = copy.deepcopy(saved)
    change(saved)
    _, ours = build()
    with pytest.raises(SettingError, match=message):
        import_state(ours, saved)
