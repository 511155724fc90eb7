"""Small models for the Trainer of transformers, and a Trainer that adds the penalty of ADMM to its own loss."""

from pathlib import Path

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from lightning_muws import MicroStructure, Penalty, Phases

STRUCTURE = MicroStructure((2, 4), prune_ratio=0.5, unify_ratio=0.25)
PHASES = Phases(interval="step", admm_start=2, admm_end=10, update_every=2)
PENALTY = Penalty(rho=0.1, rho_growth=1.5, rho_max=0.2, relative=False)


class Net(nn.Module):
    """Two linear layers in float64."""

    def __init__(self, n_hidden: int = 16) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(32, n_hidden), nn.Tanh(), nn.Linear(n_hidden, 4)).double()

    def forward(self, inputs, labels):
        outputs = self.layer(inputs)
        return {"loss": (outputs - labels).square().mean(), "logits": outputs}


def net(**options) -> Net:
    torch.manual_seed(0)
    return Net(**options)


def data(n: int) -> list[dict[str, torch.Tensor]]:
    inputs = torch.randn(n, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return [{"inputs": x, "labels": x[:4].sin()} for x in inputs]


def bert() -> BertForSequenceClassification:
    """Return a transformer with dropout."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=16, **sizes))


def sentences(n: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 50, (n, 8), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": x, "labels": x[0] % 2} for x in ids]


def trainer(
    folder: Path, model: nn.Module, *callbacks: TrainerCallback, dataset=None, kind=Trainer, **options
) -> Trainer:
    handed = {key: options.pop(key) for key in ("optimizers", "eval_dataset") if key in options}
    given = {"max_steps": 14, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_strategy": "no"} | options
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "use_cpu": True, "seed": 0}
    args = TrainingArguments(str(folder), **{**quiet, **given})
    train_dataset = data(22) if dataset is None else dataset
    return kind(model=model, args=args, train_dataset=train_dataset, callbacks=list(callbacks), **handed)


class Explicit(TrainerCallback):
    """Keeps Z and U itself, at the steps of PHASES; ``penalty`` is ``sum rho / 2 * |W - Z + U|^2``."""

    covered = ("layer.0.weight", "layer.2.weight")

    def __init__(self, model: nn.Module) -> None:
        self.model, self.z, self.u, self.rho = model, {}, {}, 0.1

    def on_step_begin(self, args, state, control, **_):
        if state.global_step not in (2, 4, 6, 8):
            return
        for name in self.covered:
            w = self.model.get_parameter(name).detach()
            if state.global_step == 2:
                self.z[name], self.u[name] = STRUCTURE.project(w), torch.zeros_like(w)
            else:
                self.z[name] = STRUCTURE.project(w + self.u[name])
                self.u[name] = self.u[name] + w - self.z[name]
        if state.global_step > 2:
            rho, self.rho = self.rho, min(self.rho * 1.5, 0.2)
            self.u = {name: u * (rho / self.rho) for name, u in self.u.items()}

    def penalty(self):
        squares = [(self.model.get_parameter(n) - z + self.u[n]).square().sum() for n, z in self.z.items()]
        return self.rho / 2 * sum(squares)


class ExplicitTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        explicit = next(x for x in self.callback_handler.callbacks if isinstance(x, Explicit))
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch) + explicit.penalty()


class Snapshot(TrainerCallback):
    """Keeps the weights as the last step of ADMM left them."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == PHASES.admm_end:
            self.weights = {name: p.detach().clone() for name, p in kwargs["model"].named_parameters()}


class Killed(Exception):  # noqa: N818  it is no error
    pass


class Kill(TrainerCallback):
    """Ends the training in the middle, after some step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Killed
