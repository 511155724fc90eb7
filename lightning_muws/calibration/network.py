"""A network fitted to calibration batches, layer after layer, in the order in which the network calls them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_muws.calibration.batches import Forward
from lightning_muws.calibration.layers import is_linear, layer_grid, weight_and_bias
from lightning_muws.calibration.lockstep import walk
from lightning_muws.calibration.moments import Moments, energy, output_error, second_moments, toward_dense
from lightning_muws.calibration.norms import is_batch_norm, running_statistics
from lightning_muws.calibration.refit import Rate, inverse_factor, nearest, refit
from lightning_muws.errors import StateError
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.plan import clean_name


class Observed(NamedTuple):
    """What the calibration batches tell about a layer of the dense network.

    Args:
        energy: ``E|W x|^2``, the mean squared output, its bias included.
        stiffness: What a squared error of 1 in a weight costs on average, when the columns behind it are refitted.
    """

    energy: float
    stiffness: float


@dataclass(frozen=True)
class Target:
    """What a layer's weight shall become.

    Args:
        grid: How the weight is seen as a matrix, and cut into blocks.
        rate: Its step, and what bits cost; a step of 0 leaves the weight as it is.
        is_cut: Whether its blocks may be unified and pruned.
        bias_step: The step of its bias; 0 leaves the bias exact.
        fallback: ``(down, across)`` uint8, the kinds of its blocks if it is rounded to the nearest.
        choose: Returns the kinds of blocks of a weight of the layer's shape; None chooses the cheapest ones.
    """

    grid: BlockGrid
    rate: Rate
    is_cut: bool
    bias_step: float = 0.0
    fallback: Tensor | None = None
    choose: Callable[[Tensor], Tensor] | None = None


class Fitted(NamedTuple):
    """The error of a layer's outputs as a share of their size, ``|y - y'| / |y|``.

    Args:
        error_nearest: If the weight were rounded to the nearest.
        error: Of the refitted weight.
    """

    error_nearest: float
    error: float


class CalibratedNetwork:
    """A dense network, a copy of it that is compressed, and the batches that both run on.

    Args:
        dense: In evaluation mode; it is not changed.
        compressed: A copy of it, in evaluation mode; its weights are changed in place.
        batches: The calibration batches.
        forward: Runs a model on a batch.
    """

    def __init__(self, dense: nn.Module, compressed: nn.Module, batches: Sequence[Any], forward: Forward) -> None:
        self.dense, self.compressed, self.batches, self.forward = dense, compressed, batches, forward
        self.layers = _layers(dense)
        self.twins = _layers(compressed)
        self.norms = [name for name, module in dense.named_modules() if is_batch_norm(module)]
        self.calls: Counter[str] = Counter()
        self.observed: dict[str, Observed] = {}

    def observe(self) -> dict[str, Observed]:
        """Return what is known of each layer that the dense network calls, by the name of its weight.

        Raises:
            StateError: The network fails on a batch, or a layer's input has NaN or Inf; the message names the layer.
        """

        def visit(name: str, inputs: Sequence[Tensor]) -> None:
            refuse_non_finite(name, inputs)
            self._observe(name, [(x, x) for x in inputs])

        with torch.no_grad():
            self.calls = walk(self.layers, self._runs(self.dense), visit)
            for name, n in self.calls.items():
                if n > 1:
                    self._observe(name, self._all_calls(name))
        return self.observed

    def _observe(self, name: str, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        if (moments := self._moments(name, pairs)) is None:
            return
        matrix = self._matrix(name)
        factor = inverse_factor(moments.own.to(torch.float64), moments.damping)
        scale = factor.diagonal(dim1=1, dim2=2)[:, : matrix.shape[1] - self.refits_bias(name)]
        self.observed[name] = Observed(energy(matrix, moments.own), float((1 / scale.square()).mean()))

    @torch.no_grad()
    def fit(self, targets: Mapping[str, Target], done: Callable[[str], None] = lambda name: None) -> dict[str, Fitted]:
        """Fit the compressed network's observed layers to their targets, and re-estimate its batch norms.

        Both networks run in lockstep: each layer is refitted for inputs that come through the layers already
        compressed, so that it returns what it returns in the dense network.

        Args:
            targets: By the name of the weight.
            done: Called with the name of each layer that is fitted.
        """
        dense, compressed = "dense ", "compressed "
        norms = {name: [self.compressed.get_submodule(name)] for name in self.norms}
        places = {dense + name: modules for name, modules in self.layers.items() if name in targets}
        places |= {compressed + name: modules for name, modules in self.twins.items() if name in targets} | norms
        held: dict[str, Sequence[Tensor]] = {}
        found: dict[str, Fitted] = {}

        def visit(place: str, inputs: Sequence[Tensor]) -> None:
            name = place.removeprefix(dense).removeprefix(compressed)
            if place in norms:
                _estimate(norms[place][0], inputs)
            elif place.startswith(dense):
                held[name] = inputs
            else:
                refuse_non_finite(name, inputs)
                others = held.pop(name, ())
                pairs: Iterable[tuple[Tensor, Tensor]]
                pairs = zip(inputs, others if len(others) == len(inputs) else inputs, strict=True)
                moments = self._moments(name, self._all_calls(name) if self.calls[name] > 1 else pairs)
                if moments is not None:
                    found[name] = self._fit(name, moments, targets[name])
                done(name)

        walk(places, [*self._runs(self.dense), *self._runs(self.compressed)], visit)
        return found

    def _fit(self, name: str, moments: Moments, target: Target) -> Fitted:
        """Write the fitted weight and bias of a layer, and return their errors."""
        weight, bias = weight_and_bias(self.twins[name][0])
        rate, grid, n_free = target.rate, target.grid, self.refits_bias(name)
        cut = grid if target.is_cut else None
        matrix = self._matrix(name)
        n = matrix.shape[1] - n_free
        wanted = toward_dense(matrix, moments, moments.damping)

        def back(x: Tensor) -> Tensor:
            return grid.weight(x[:, :n].contiguous(), weight.shape).to(weight.dtype)

        plain = grid.matrix(nearest(weight.detach(), rate.step, cut, target.fallback, rate.shares_signs))
        found = wanted
        if rate.step:
            kinds = None
            if target.choose is not None:  # weights of large inputs count more, as in Sun et al. 2024 (Wanda)
                sizes = moments.own.diagonal(dim1=1, dim2=2).sqrt()
                kinds = target.choose(back(wanted * sizes.repeat_interleave(len(matrix) // len(sizes), 0)))
            found = refit(wanted, moments.own, rate, cut, kinds, n_free, moments.damping)
        weight.copy_(nearest(back(found), rate.step, None, None, False))  # the products that a file has, to the bit
        if n_free and bias is not None:
            bias.copy_(nearest(found[:, n].to(bias.dtype), target.bias_step, None, None, False))
        size = self.observed[name].energy
        rivals = torch.cat([plain.to(matrix), matrix[:, n:]], 1), found
        return Fitted(*(math.sqrt(output_error(matrix, x, moments, size) / size) for x in rivals))

    def _runs(self, model: nn.Module) -> list[Callable[[], object]]:
        return [lambda batch=batch: self.forward(model, batch) for batch in self.batches]  # type: ignore[misc]

    def refits_bias(self, name: str) -> int:
        """Return 1 if the layer has a bias that no other layer shares, else 0."""
        own, *others = (weight_and_bias(module)[1] for module in self.layers[name])
        shared = sum(getattr(module, "bias", None) is own for module in self.dense.modules()) > 1
        return int(own is not None and not others and not shared)

    def _matrix(self, name: str) -> Tensor:
        """Return the weight of a layer of the dense network as ``(out, n)`` float32, its bias as the last column."""
        module = self.layers[name][0]
        weight, bias = weight_and_bias(module)
        matrix = layer_grid(module).matrix(weight.detach()).to(torch.float32)
        if bias is None or not self.refits_bias(name):
            return matrix
        return torch.cat([matrix, bias.detach().to(matrix)[:, None]], 1)

    def _moments(self, name: str, pairs: Iterable[tuple[Tensor, Tensor]]) -> Moments | None:
        """Return the moments of a layer's inputs.

        Raises:
            StateError: They overflow, or have a wrong shape.
        """
        try:
            found = second_moments(self.layers[name][0], pairs, bool(self.refits_bias(name)))
        except (RuntimeError, ValueError, IndexError) as error:
            raise StateError(
                f"the layer of {name} cannot be fed by the calibration batches: {error}; give inputs that it accepts"
            ) from error
        if found is not None and not all(torch.isfinite(x).all() for x in (found.own, found.cross)):
            raise StateError(f"the inputs of {name} are so large that their squares overflow: scale the batches")
        return found

    def _all_calls(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the inputs of all calls of a layer in the dense network, from one more forward pass of each batch."""
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((args[0] if args else kwargs["input"]).detach())

        handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in self.layers[name]]
        try:
            for batch in self.batches:
                seen.clear()
                self.forward(self.dense, batch)
                refuse_non_finite(name, seen)
                yield from ((x, x) for x in seen)
        finally:
            for handle in handles:
                handle.remove()


def refuse_non_finite(name: str, inputs: Sequence[Tensor]) -> None:
    """Check that what a layer is called with is finite.

    Raises:
        StateError: It has NaN or Inf.
    """
    for i, x in enumerate(inputs):
        if not torch.isfinite(x).all():
            raise StateError(
                f"the layer of {name} gets NaN or Inf from calibration batch {i}: give batches of finite values"
            )


def _layers(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the layers that are linear in their inputs by the name of their weight; those that share it together.

    A weight that another kind of module uses as well, such as an embedding, is left out: its errors matter there too.
    """
    names = {id(p): clean_name(name) for name, p in model.named_parameters()}
    others = {id(p) for module in model.modules() if not is_linear(module) for p in module._parameters.values()}
    found: dict[str, list[nn.Module]] = {}
    for module in filter(is_linear, model.modules()):
        key = id(module._parameters.get("weight"))
        if key in names and key not in others:
            found.setdefault(names[key], []).append(module)
    return found


def _estimate(norm: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Write the running statistics of a batch norm."""
    found = running_statistics(inputs)
    if found is not None:
        for buffer, value in zip((norm.running_mean, norm.running_var), found, strict=True):
            assert isinstance(buffer, Tensor)  # noqa: S101  is_batch_norm
            buffer.copy_(half(value.to(buffer)))


def half(x: Tensor) -> Tensor:
    """Return a tensor rounded to float16 in its own dtype; itself if that would overflow or lose a value.

    Example:
        >>> half(torch.tensor([0.1, 1e6]))
        tensor([1.0000e-01, 1.0000e+06])
    """
    rounded = x.to(torch.float16)
    is_kept = torch.isfinite(rounded) & ((rounded.abs() >= torch.finfo(torch.float16).tiny) | (x == 0))
    return rounded.to(x.dtype) if bool(is_kept.all()) else x
