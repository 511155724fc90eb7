"""The reference of the callback's ADMM phase: modules that add the penalty to their own loss, in plain autograd."""

import torch
from lightning.pytorch.callbacks import Callback

from lightning_muws import MicroStructure, Penalty, Phases, WeightUnificationCallback
from lightning_muws.trainer.hooks import CompressionHooks
from tests.support.modules import STRUCTURE, fit

PHASES = Phases(admm_start=1, admm_end=4, update_every=1)
PENALTY = Penalty(rho=0.1, rho_growth=1.5, rho_max=0.2, relative=False)


class Explicit:
    """Mixin: keeps Z and U itself, at the epochs of PHASES; ``penalty`` is ``sum rho / 2 * |W - Z + U|^2``."""

    covered: tuple[str, ...] = ("layer.0.weight", "layer.2.weight")
    structure: MicroStructure = STRUCTURE

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 0:
            self.z, self.u, self.rho = {}, {}, 0.1
        for name in self.covered if self.current_epoch else ():
            w = self.get_parameter(name).detach()
            if self.current_epoch == 1:
                self.z[name], self.u[name] = self.structure.project(w), torch.zeros_like(w)
            else:
                self.z[name] = self.structure.project(w + self.u[name])
                self.u[name] = self.u[name] + w - self.z[name]
        if self.current_epoch > 1:
            rho, self.rho = self.rho, min(self.rho * 1.5, 0.2)
            self.u = {name: u * (rho / self.rho) for name, u in self.u.items()}

    def penalty(self, *prefixes: str) -> torch.Tensor | float:
        names = [name for name in self.z if not prefixes or name.startswith(prefixes)]
        squares = [(self.get_parameter(name) - self.z[name] + self.u[name]).square().sum() for name in names]
        return self.rho / 2 * sum(squares)


class Snapshot(Callback):
    """Keeps the weights, and V where a callback has one, as the last batch before the epoch ``until`` left them."""

    def __init__(self, until: int = 4):
        self.until = until

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.current_epoch < self.until:
            self.weights = {name: p.detach().cpu().clone() for name, p in pl_module.named_parameters()}
            runs = (callback._run for callback in trainer.callbacks if isinstance(callback, CompressionHooks))
            self.v = {n: admm.z(n).cpu() - admm.u(n).cpu() for r in runs if (admm := r.method) for n in admm.entries}


def assert_same_after_admm(
    module, explicit, options=dict, bound: float = 1e-12, wrap=lambda module: module, rules=()
) -> None:
    """Train both through the same ADMM phase and compare every parameter at its end.

    ``options`` makes the Trainer's options, once for each; ``wrap`` may compile the module that gets the callback.
    """
    module.load_state_dict(explicit.state_dict())
    start = {name: p.detach().clone() for name, p in explicit.named_parameters()}
    last, callback = Snapshot(), WeightUnificationCallback(explicit.structure, rules, phases=PHASES, penalty=PENALTY)
    fit(wrap(module), last, callback, max_epochs=5, **options())
    fit(explicit, max_epochs=4, **options())
    assert len(callback.history) == 3
    for name, parameter in explicit.named_parameters():
        parameter = parameter.detach().cpu()
        difference = (last.weights[name].double() - parameter.double()).abs().max()
        assert difference <= bound, f"{name} differs by {difference}"
        if name in explicit.covered:
            difference = (last.v[name].double() - (explicit.z[name] - explicit.u[name]).double().cpu()).abs().max()
            assert difference <= bound, f"V of {name} differs by {difference}"
        assert (start[name] - parameter).abs().max() > 1e-3, f"{name} did not move"
