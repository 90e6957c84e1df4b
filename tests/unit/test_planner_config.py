"""The command `memory` with a config.json that is wrong in any way: a table, or one line."""

from __future__ import annotations

import json
import logging
import random
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, GPT2Config, LlamaConfig

from lowrank_optim import cli, estimate_memory
from lowrank_optim.planner import PlanError, models
from lowrank_optim.planner.models import foreign

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "vocab_size": 50,
}  # fmt: skip
NONE = "no configuration of transformers"


@pytest.fixture
def plan(tmp_path, capsys):
    """A function that writes a config.json, plans it, and returns the status, the table and errors.

    It checks that there is either a table or a line.
    """

    def run(config, *given):
        data = config if isinstance(config, bytes) else json.dumps(config).encode()
        (tmp_path / "config.json").write_bytes(data)
        status = cli.main(
            ["memory", "--model", str(tmp_path), "--optimizer", "adamw", "--seq", "8", *given]
        )
        printed = capsys.readouterr()
        if status == 0:
            assert printed.err == ""
            assert "activations" in printed.out
        else:
            assert (status, printed.out) == (2, "")
            assert printed.err.startswith("lowrank-optim: ")
            assert printed.err.count("\n") == 1
            assert printed.err[:-1].isprintable()
        return status, printed.out, printed.err

    return run


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", NONE),
        (b"{", NONE),
        (b"null", "it holds NoneType, not an object"),
        (b"[]", "it holds list, not an object"),
        (b'"llama"', "it holds str, not an object"),
        (b"{}", NONE),
        (b'{"model_type": "\xff"}', "UnicodeDecodeError"),
        (b'{"a": ' + b"[" * 10**5, "RecursionError"),
        (b'{"a": ' * 10**5, "RecursionError"),
    ],
    ids=["empty", "cut", "null", "list", "text", "no settings", "bytes", "lists", "objects"],
)
def test_a_file_that_is_no_object_of_settings_takes_one_line(plan, data, said):
    status, _, error = plan(data)
    assert status == 2
    assert said in error


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"model_type": "lama"}, "lama"),
        ({"model_type": None}, NONE),
        ({"model_type": ["llama"]}, NONE),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": -8}, "no model of type llama"),
        ({"hidden_size": 8.5}, "hidden_size"),
        ({"hidden_size": float("nan")}, "hidden_size"),
        ({"hidden_size": 10**30}, "no model of type llama"),
        ({"num_attention_heads": 0}, NONE),
        ({"num_attention_heads": 7}, "not a multiple"),
        ({"num_attention_heads": {"a": 1}}, "num_attention_heads"),
        ({"hidden_act": "a\nb\x1b[31m"}, "no model of type llama"),
        ({"rope_parameters": {"rope_type": 7}}, "no model of type llama"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: more than 100,000"),
        ({"num_labels": 10**9}, "num_labels=1000000000: more than 100,000"),
        ({"depths": [2, 10**9]}, "depths=[2, 1000000000]: more than 100,000"),
        ({"text_config": {"n_layer": 10**9}}, "n_layer=1000000000: more than 100,000"),
        ({"quantization_config": 5}, NONE),
        ({"to_dict": 5}, ": "),
        ({"architectures": [5]}, "architectures=[5]: wanted a list of class names"),
        ({"architectures": "LlamaForCausalLM"}, "wanted a list of class names"),
        ({"architectures": {}}, "wanted a list of class names"),
        ({"architectures": ["pipeline"]}, "transformers has no model class 'pipeline'"),
        ({"architectures": ["LlamaConfig"]}, "no model class 'LlamaConfig'"),
        ({"architectures": ["LLaMAForCausalLM"]}, "did you mean LlamaForCausalLM?"),
        ({"architectures": ["ViTModel"]}, "no model of type llama"),
        ({"architectures": ["LlamaModel"]}, "LlamaModel cannot be run without values"),
    ],
    ids=str,
)
def test_a_wrong_setting_takes_one_line(plan, wrong, said):
    status, _, error = plan({**LLAMA, **wrong})
    assert status == 2
    assert said in error


def test_code_of_the_file_is_neither_run_nor_asked_for(plan):
    """transformers would ask on the terminal, and wait."""
    code = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    for kind in ("mine", "vit"):
        status, _, error = plan({"model_type": kind, "auto_map": code})
        assert status == 2
        assert "custom code" in error or "no model of type vit" in error


VALUES = [
    None, True, 0, -1, 7, 2**63, 0.5, 1e308, float("nan"), float("inf"), "", "text", "a\n\x1b[31m",
    [], [None], ["x"], {}, {"a": 1},
]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_any_value_in_any_place_gives_a_table_or_one_line(plan, seed):
    """A sample; thousands were tried by hand."""
    rng = random.Random(seed)
    bases = [
        LlamaConfig(**LLAMA).to_dict(),
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
                   vocab_size=50).to_dict(),
        GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50).to_dict(),
    ]  # fmt: skip
    for _ in range(12):
        config = dict(rng.choice(bases))
        config[rng.choice(list(config))] = rng.choice(VALUES)
        plan(config)


def test_a_folder_in_the_place_of_the_file_and_a_file_that_may_not_be_read(
    plan, tmp_path, monkeypatch, capsys
):
    def refuse(path, *given):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", refuse)
        assert "Permission denied" in plan(LLAMA)[2]
    (tmp_path / "folder" / "config.json").mkdir(parents=True)
    for name in ("folder", "folder/config.json"):
        assert cli.main(["memory", "--model", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert "no such file" in error
        assert error.count("\n") == 1


def test_a_count_by_any_name_stops_at_more_tensors_than_models_have(plan, monkeypatch):
    monkeypatch.setattr(models, "MOST", 20)
    assert plan({**LLAMA, "num_hidden_layers": 2})[0] == 2  # 2 x 9 and 3 more
    assert "more than 20 parameter tensors" in plan({**LLAMA, "num_hidden_layers": 2})[2]
    assert plan(LLAMA)[0] == 0
    nn.ModuleList(nn.Linear(2, 2) for _ in range(20))  # nothing is counted any more


def test_what_others_raise_log_and_warn_is_one_line():
    seen = logging.Handler()
    seen.emit = lambda record: seen.said.append(record.getMessage())
    seen.said = []
    logger = logging.getLogger("transformers.somewhere")
    logger.addHandler(seen)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with foreign("this file"):
            logger.error("first")
            warnings.warn("first", stacklevel=1)
        logger.error("second")
        warnings.warn("second", stacklevel=1)
    logger.removeHandler(seen)
    assert seen.said == [str(one.message) for one in warned] == ["second"]
    for error, said in (
        (KeyError("a"), "this file: KeyError: 'a'"),
        (ValueError("a\n  b"), "this file: a b"),
        (AssertionError(), "this file: AssertionError"),
        (SystemExit(3), "this file: SystemExit: 3"),
        (RuntimeError("x" * 1000), f"this file: RuntimeError: {'x' * 240}..."),
    ):
        with pytest.raises(PlanError) as raised, foreign("this file"):
            raise error
        assert str(raised.value) == said
    with pytest.raises(KeyboardInterrupt), foreign("this file"):
        raise KeyboardInterrupt


def test_a_model_that_cannot_checkpoint_says_so():
    class Net(nn.Linear):
        def gradient_checkpointing_enable(self):
            raise TypeError("not\nhere")

    with pytest.raises(PlanError, match=r"^Net cannot checkpoint: TypeError: not here$"):
        estimate_memory(Net(9, 7), rank=3, checkpointing=True)


def test_a_factory_may_exit_or_return_what_cannot_be_copied(tmp_path, monkeypatch, capsys):
    (tmp_path / "odd_factories.py").write_text(
        "import sys, threading\nfrom torch import nn\n\ndef leaves():\n    sys.exit(0)\n\n"
        "def locked():\n    net = nn.Linear(9, 9)\n    net.lock = threading.Lock()\n"
        "    return net\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("leaves", "locked"):
        assert cli.main(["memory", "--model", f"odd_factories:{name}"]) == 2
        error = capsys.readouterr().err
        assert f"odd_factories:{name} makes no model: " in error
        assert error.count("\n") == 1


@pytest.mark.filterwarnings("error:Glyph")
@pytest.mark.parametrize("name", ["co$t^{x_$", "[/x] [bold] :warning:", "a\nb, \x1b[31m"])
def test_names_are_shown_as_they_are(name, tmp_path, capsys):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    picture = folder / "bars.png"
    given = ["--model", str(folder), "--optimizer", "adamw", "--seq", "8", "--plot", str(picture)]
    assert cli.main(["memory", *given]) == 0
    printed = capsys.readouterr()
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    assert "".join(shown.split()) in "".join(printed.out.split())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert torch.get_default_device().type == "cpu"
