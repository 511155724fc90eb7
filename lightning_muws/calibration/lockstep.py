"""Lockstep: a model runs on all batches at once, and stops before each layer until every batch has arrived there.

So a layer can be changed after the inputs of all batches to it are known, and before any of them goes through it. The
layers are visited in the order in which the model calls them, each once, and one forward pass a batch is enough.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muws.errors import StateError


class _Stopped(BaseException):
    """Ends a batch's thread whose visit failed."""


class _Walker:
    """One batch on its way through the model, in a thread of its own that runs only while the caller waits."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.at: str | None = None  # the layer that it waits at; None if it has arrived at the end
        self.input: Tensor | None = None
        self.error: Exception | None = None
        self.last = ""  # the layer that it reached last
        self._go, self._here, self._is_stopped = threading.Semaphore(0), threading.Semaphore(0), False
        self.thread = threading.Thread(target=self._main, args=(run,), daemon=True)
        self.thread.start()

    def _main(self, run: Callable[[], object]) -> None:
        self._go.acquire()
        try:
            if not self._is_stopped:
                with torch.no_grad():  # a setting of each thread
                    run()
        except _Stopped:
            pass
        except Exception as error:
            self.error = error
        self.at = self.input = None
        self._here.release()

    def wait_at(self, name: str, x: Tensor) -> None:
        """Stop the walker at a layer; called in its own thread."""
        self.at, self.input = name, x
        self._here.release()
        self._go.acquire()
        self.at = self.input = None
        self.last = name
        if self._is_stopped:
            raise _Stopped

    def resume(self) -> None:
        """Let the walker go on to the next layer that it stops at, or to the end."""
        self._go.release()
        self._here.acquire()

    def stop(self) -> None:
        """End the walker's thread."""
        self._is_stopped = True
        self._go.release()
        self.thread.join()


def walk(
    layers: Mapping[str, Sequence[nn.Module]],
    runs: Sequence[Callable[[], object]],
    visit: Callable[[str, Sequence[Tensor]], None],
) -> Counter[str]:
    """Run all batches in lockstep, and visit each layer once, before any batch goes through it.

    Batches may take different ways: a layer is visited with the inputs of those that wait at it when the first batch
    that has not ended does. Later ones go through it as it is.

    Args:
        layers: The modules of each layer, by name: several modules if they share a weight.
        runs: Each runs the model on one batch, without gradients.
        visit: Called with the name of a layer and the first input of each batch to it.

    Returns:
        How often the first batch went through each layer.

    Raises:
        StateError: The model fails on a batch; the message names the last layer that was called.
    """
    walkers: list[_Walker] = []
    visited: set[str] = set()
    calls: Counter[str] = Counter()
    own: dict[int | None, _Walker] = {}  # by thread

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            walker = own.get(threading.get_ident())
            x = args[0] if args else kwargs.get("input")
            if walker is walkers[0]:
                calls[name] += 1
            if walker is not None and name not in visited and isinstance(x, Tensor):
                walker.wait_at(name, x.detach())

        return before

    with _hooks(layers, hook):
        try:
            for run in runs:
                walkers.append(_Walker(run))
                own[walkers[-1].thread.ident] = walkers[-1]
                _resume(walkers, len(walkers) - 1)
            while leader := next((walker for walker in walkers if walker.at is not None), None):
                name = leader.at
                assert name is not None  # noqa: S101  of a walker that waits
                inputs = [walker.input for walker in walkers if walker.at == name and walker.input is not None]
                visit(name, inputs)
                visited.add(name)
                del inputs
                for i, walker in enumerate(walkers):
                    if walker.at == name:
                        _resume(walkers, i)
        finally:
            for walker in walkers:
                walker.stop()
    return calls


def _resume(walkers: Sequence[_Walker], i: int) -> None:
    walkers[i].resume()
    if error := walkers[i].error:
        place = f"at layer {walkers[i].last} or behind it" if walkers[i].last else "before its first layer"
        raise StateError(
            f"the model fails on calibration batch {i} {place}: {type(error).__name__}: {error}; "
            "give batches that its forward accepts, or forward= to feed them"
        ) from error


@contextmanager
def _hooks(layers: Mapping[str, Sequence[nn.Module]], make: Callable[[str], Any]) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(make(name), with_kwargs=True)
        for name, modules in layers.items()
        for module in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
