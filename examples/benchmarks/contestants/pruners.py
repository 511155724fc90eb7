"""Tools that prune, each with its own method: half of the epochs to prune, the other half with the mask fixed.

None of them stores anything smaller than a dense file, so each gets the smaller of two: our lossy file, with the
largest `max_error` that loses 0.1 points or less on the test set, and `torch.save` through lzma. The setting is the
percentage of weights pruned, of channels for Torch-Pruning. The first and the last layer stay dense where one mask
covers one layer, as is customary.
"""

from __future__ import annotations

import warnings

import torch
from fitting import train
from torch import Tensor, nn
from torch.nn import functional as F

from contestants.arena import EPOCHS, Arena, fit, steps_of
from contestants.dense import zipped
from contestants.environments import stand_in
from contestants.sized import rounded

PRUNING_EPOCHS = 5
EVERY = 50  # steps between two updates of a mask
INNER = {"features.2": (4, 1, 1, 1), "features.4": (4, 1, 1, 1), "classifier.0": (4, 1)}  # their blocks: 4 outputs


def inc(arena: Arena, setting: str) -> dict:
    """Intel Neural Compressor: blocks of 4x1, momentum of SNIP scores, one threshold for the network."""
    from neural_compressor.training import WeightPruningConfig, prepare_pruning

    model = arena.start()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    recipe = {"pattern": "4x1", "pruning_type": "snip_momentum", "pruning_scope": "global", "op_names": list(INNER)}
    recipe |= {"target_sparsity": float(setting) / 100, "max_sparsity_ratio_per_op": 0.995, "start_step": 1}
    recipe |= {"end_step": steps_of(arena.data, PRUNING_EPOCHS), "pruning_frequency": EVERY}
    prepare_pruning(model, WeightPruningConfig([recipe]), optimizer)
    fit(model, arena.data, EPOCHS, optimizer=optimizer)
    return judged(arena, model)


def nni_agp(arena: Arena, setting: str) -> dict:
    """NNI 3: automated gradual pruning by the L1 norm of blocks of 4 outputs, one share for all layers."""
    import nni
    from nni.compression import TorchEvaluator
    from nni.compression.pruning import AGPPruner, L1NormPruner

    model = arena.start()

    def training(model: nn.Module, optimizer: torch.optim.Optimizer, *_: object) -> None:
        fit(model, arena.data, EPOCHS, optimizer=optimizer)

    def training_step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    evaluator = TorchEvaluator(training, nni.trace(torch.optim.Adam)(model.parameters(), lr=1e-3), training_step)
    ratio = float(setting) / 100
    recipe = [{"op_names": [n], "sparse_ratio": ratio, "granularity": list(block)} for n, block in INNER.items()]
    times = steps_of(arena.data, PRUNING_EPOCHS) // EVERY
    pruner = AGPPruner(L1NormPruner(model, recipe, evaluator), interval_steps=EVERY, total_times=times)
    _, masks = pruner.compress(max_steps=steps_of(arena.data, EPOCHS), max_epochs=None)
    pruner.unwrap_model()
    apply(model, {f"{name}.weight": found["weight"] for name, found in masks.items()})
    return judged(arena, model)


def nni_admm(arena: Arena, setting: str) -> dict:
    """NNI 2: ADMM on single weights, whose penalty we mended to rho / 2 times the squared distance, then retraining."""
    from nni.algorithms.compression.v2.pytorch import TorchEvaluator
    from nni.algorithms.compression.v2.pytorch.pruning import ADMMPruner

    model = arena.start()

    def training(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: object, *_: object) -> None:
        for images, labels in arena.data.train_dataloader():
            optimizer.zero_grad()
            criterion(model(images), labels).backward()
            optimizer.step()

    def penalty(self: ADMMPruner, loss: Tensor) -> Tensor:
        for name, wrapper in self.get_modules_wrapper().items():
            distance = wrapper.weight - self.Z[name]["weight"] + self.U[name]["weight"]
            loss = loss + wrapper.config["rho"] / 2 * distance.square().sum()
        return loss

    import nni

    ADMMPruner.loss_patch = penalty  # as shipped it makes NaN of every weight
    optimizer = nni.trace(torch.optim.Adam)(model.parameters(), lr=1e-3)
    evaluator = TorchEvaluator(training, optimizer, F.cross_entropy, dummy_input=arena.data.test.images[:1])
    recipe = [{"op_names": [name], "sparsity_per_layer": float(setting) / 100, "rho": 0.01} for name in INNER]
    pruner = ADMMPruner(model, recipe, evaluator, iterations=PRUNING_EPOCHS, training_epochs=1)
    _, found = pruner.compress()
    pruner._unwrap_model()
    masks = {f"{name}.weight": mask["weight"] for name, mask in found.items()}
    apply(model, masks)
    fit(model, arena.data, EPOCHS - PRUNING_EPOCHS, after_step=lambda step: apply(model, masks))
    return judged(arena, model)


def torch_ao(arena: Arena, setting: str) -> dict:
    """torch.ao: blocks of 4x1 in the large linear layer; the weights of convolutions it refuses."""
    from torch.ao.pruning import WeightNormSparsifier

    model = arena.start()
    sparsifier = WeightNormSparsifier(sparsity_level=0.0, sparse_block_shape=(4, 1), zeros_per_block=4)
    sparsifier.prepare(model, [{"tensor_fqn": "classifier.0.weight"}])

    def update(step: int) -> None:
        if (done := step_share(arena, step)) is not None:
            for group in sparsifier.groups:
                group["sparsity_level"] = cubic(float(setting) / 100, done)
            sparsifier.step()

    fit(model, arena.data, EPOCHS, after_step=update)
    sparsifier.squash_mask()
    return judged(arena, model)


def lightning_pruning(arena: Arena, setting: str) -> dict:
    """Lightning's ModelPruning: single weights of all layers by magnitude, in five steps."""
    from lightning.pytorch.callbacks import ModelPruning

    model, share = arena.start(), float(setting) / 100

    def amount(epoch: int) -> float:  # of the weights that are left
        before, after = (cubic(share, min(1, e / PRUNING_EPOCHS)) for e in (epoch, epoch + 1))
        return (after - before) / (1 - before)

    layers = [(layer, "weight") for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    callback = ModelPruning("l1_unstructured", layers, amount=amount, use_lottery_ticket_hypothesis=False)
    train(model, arena.data, EPOCHS, callback)
    return judged(arena, model)


def torch_pruning(arena: Arena, setting: str) -> dict:
    """Torch-Pruning: whole channels by their magnitude, at once, then ten epochs."""
    import torch_pruning as tool

    model, image = arena.start(), arena.data.test.images[:1]
    tool.pruner.BasePruner(
        model,
        image,
        importance=tool.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=float(setting) / 100,
        ignored_layers=[model.classifier[2]],
    ).step()
    fit(model, arena.data, EPOCHS)
    return judged(arena, model)


def modelopt(arena: Arena, _setting: str) -> dict:
    """NVIDIA ModelOpt: the two largest of each four inputs."""
    warnings.simplefilter("ignore")
    from modelopt.torch import sparsity

    model = sparsity.sparsify(arena.start(), "sparse_magnitude")
    fit(model, arena.data, EPOCHS)
    return judged(arena, sparsity.export(model))


def fasterai(arena: Arena, setting: str) -> dict:
    """The Sparsifier of fasterai: single weights of all layers by magnitude; its callback needs fastai's Learner."""
    stand_in("torchvision", "torchvision.models", "torchvision.transforms")
    from fasterai.core.criteria import large_final
    from fasterai.sparse.sparsifier import Sparsifier

    model = arena.start()
    tool = Sparsifier(model, "weight", "global", large_final, layer_type=(nn.Conv2d, nn.Linear))

    def update(step: int) -> None:
        if (done := step_share(arena, step)) is not None:
            tool.sparsify_model(cubic(float(setting) / 100, done))
        tool._apply_masks()

    fit(model, arena.data, EPOCHS, after_step=update)
    return judged(arena, model)


def cubic(share: float, done: float) -> float:
    """Return how much is pruned after a part of the pruning epochs (Zhu and Gupta 2017).

    Example:
        >>> cubic(0.5, 0.0), cubic(0.5, 0.5), cubic(0.5, 1.0)
        (0.0, 0.4375, 0.5)
    """
    return share * (1 - (1 - done) ** 3)


def step_share(arena: Arena, step: int) -> float | None:
    """Return the part of the pruning epochs that is done, or None where the mask stays as it is."""
    n_steps = steps_of(arena.data, PRUNING_EPOCHS)
    return min(1.0, (step + 1) / n_steps) if (step % EVERY == 0 and step < n_steps) or step == n_steps - 1 else None


def apply(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Set what masks exclude to 0."""
    for name, mask in masks.items():
        model.get_parameter(name).data.mul_(mask)


def judged(arena: Arena, model: nn.Module) -> dict:
    """Return the row of a pruned network, with the share of its weights that are zero, channels removed included."""
    fresh = arena.fresh()
    state = {name: x.detach() for name, x in model.state_dict().items() if name in fresh.state_dict()}
    if missing := set(fresh.state_dict()) - set(state):
        raise ValueError(f"the pruned network has no {', '.join(missing)}")
    n_left = sum(int(x.count_nonzero()) for x in state.values())
    into = model if any(x.shape != state[name].shape for name, x in fresh.state_dict().items()) else fresh
    row = arena.judged([rounded(arena, state, into), zipped(state)], into=into)
    return {**row, "zeros": 1 - n_left / sum(x.numel() for x in fresh.state_dict().values())}


SETTINGS = {
    inc: ("75", "90", "96"),
    nni_agp: ("75", "90", "96"),
    nni_admm: ("75", "90", "96"),
    torch_ao: ("75", "90", "96"),
    lightning_pruning: ("75", "90", "96"),
    torch_pruning: ("50", "70", "80"),
    modelopt: ("50",),
    fasterai: ("75", "90", "96"),
}
