"""The house: rooms import downwards only, no files import each other in a circle, few lie flat."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lowrank_optim

ROOT = Path(lowrank_optim.__file__).parent
FLOORS = (
    {"functional", "terminal", "_version"},
    {"sharding"},
    {"parts"},
    {"settings"},
    {"roles"},
    {"groups"},
    {"engine"},
    {"layerwise", "checkpoints"},
    {"optimizer"},
    {"methods"},
    {"integrations"},
    {"planner", "demo"},
    {"cli", "__init__"},
)
"""Rooms, the lowest first; a room imports from floors below its own."""
FLAT = 8
Module = tuple[str, ...]


def modules() -> dict[Module, Path]:
    """Return every file of the package by its name within it."""
    found = {}
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT).with_suffix("").parts
        found[name[:-1] if name[-1] == "__init__" else name] = path
    return found


def imports() -> dict[Module, set[Module]]:
    """Return what each file imports of the package, anywhere in it."""
    files = modules()
    found: dict[Module, set[Module]] = {name: set() for name in files}
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name[:-1]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) - node.level + 1]
                base += tuple(node.module.split(".")) if node.module else ()
                names = {(*base, alias.name) for alias in node.names}
                found[name] |= {each if each in files else base for each in names} - {name}
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                named = [alias.name for alias in node.names]
                named += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                itself = [each for each in named if each.split(".")[0] == "lowrank_optim"]
                assert not itself, f"{path}: within the package imports are relative, not {itself}"
    return found


def room(name: Module) -> str:
    """Return the room of a file: its folder, or itself where it lies flat."""
    return name[0] if name else "__init__"


def floor(name: Module) -> int:
    """Return the floor of a file."""
    return next(place for place, rooms in enumerate(FLOORS) if room(name) in rooms)


def test_every_room_has_a_floor():
    assert {room(name) for name in modules()} == set().union(*FLOORS)


def test_few_files_lie_flat():
    flat = [path.name for path in ROOT.glob("*.py")]
    assert len(flat) <= FLAT, f"{flat}: a new file belongs into a room"


def test_rooms_import_downwards():
    upwards = [
        f"{'.'.join(name)} imports {'.'.join(other) or 'lowrank_optim'}"
        for name, others in imports().items()
        for other in others
        if room(name) != room(other) and floor(other) >= floor(name)
    ]
    assert not upwards, f"a room imports from floors below its own, except here: {upwards}"


def circle(start: Module, graph: dict[Module, set[Module]]) -> list[Module]:
    """Return the files of a circle through a file; none if there is no such circle."""
    paths = [[start]]
    seen = set()
    while paths:
        path = paths.pop()
        for other in graph[path[-1]] - seen:
            if other == start:
                return path
            seen.add(other)
            paths.append([*path, other])
    return []


def test_no_files_import_each_other_in_a_circle():
    graph = imports()
    circles = {frozenset(found) for name in graph if (found := circle(name, graph))}
    assert not circles, f"files that import each other in a circle: {circles}"


@pytest.mark.parametrize("path", sorted((ROOT / "functional").glob("*.py")), ids=lambda p: p.stem)
def test_references_need_no_triton(path):
    assert "triton" not in {
        alias.name.split(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
