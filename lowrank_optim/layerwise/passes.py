"""Backward passes as hooks on parameters see them: under way, ended, failed."""

from __future__ import annotations

import sys
from functools import partial
from types import FrameType
from typing import Any

import torch


class Passes:
    """Tell a backward pass that an exception has ended from a pass that waits for another one.

    A pass that has failed never reports its end. Reentrant checkpoints run a pass inside a node of
    an outer pass, which waits meanwhile. The outer pass is known by that node: nodes of a graph run
    from the last one made to the first.
    """

    def __init__(self) -> None:
        self._open: set[Any] = set()
        self._last_made: int | None = None

    def enter(self) -> bool:
        """Note the pass that calls a hook; return whether one before it is found to have failed."""
        task = torch._C._current_graph_task_id()
        if task < 0 or task in self._open:
            return False
        node = outermost_node()
        made = None if node is None else int(node._sequence_nr())
        newer = made is None or (self._last_made is not None and made > self._last_made)
        failed = bool(self._open) and newer
        if failed or not self._open:
            self._open.clear()
            self._last_made = None
        if node is not None and node not in self._open:
            self._last_made = self._last_made or made
            self._open.add(node)
            node.register_hook(partial(self._after, node))
        self._watch(task)
        return failed

    def _watch(self, task: int) -> None:
        """Note the end of the pass that this is called in."""
        self._open.add(task)
        queue = torch.autograd.Variable._execution_engine.queue_callback
        queue(partial(self._open.discard, task))

    def _after(self, node: Any, *_: Any) -> None:
        """Watch the outer pass from the node on in which another one was run."""
        self._open.discard(node)
        if (task := torch._C._current_graph_task_id()) not in self._open:
            self._watch(task)


def outermost_node() -> Any:
    """Return the node of a graph that runs the backward pass under way; None without a node."""
    node = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == torch.autograd.function.__name__:
            node = frame.f_locals.get("self", node)
        frame = frame.f_back
    return node
