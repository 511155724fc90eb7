"""compression=: the callback chooses all ratios for one size of the file, and the file has that size."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringDataModule
from torch import nn

from lightning_muws import (
    LayerRule,
    MicroStructure,
    NMStructure,
    Phases,
    WeightUnificationCallback,
    inspect_compressed,
    load_compressed,
)
from lightning_muws.cli import MuwsCLI
from lightning_muws.errors import PlanError, SettingError, StateError
from lightning_muws.training.budget import KEPT
from tests.support.explicit import PHASES
from tests.support.modules import Probe, TwoLayers, fit
from tests.support.strategies import same_bits, same_bytes
from tests.trainer.test_ranks import launch

PROVIDED = "ignore:.*callbacks used to create the checkpoint need to be provided"


class Wide(TwoLayers):
    """Enough weights for a file whose headers do not matter most, a norm, and a buffer that no file holds."""

    def __init__(self, optimizer: str = "adam") -> None:
        super().__init__(optimizer)
        self.layer = nn.Sequential(
            nn.Linear(32, 96), nn.BatchNorm1d(96), nn.Tanh(), nn.Linear(96, 64), nn.Linear(64, 4)
        )
        self.register_buffer("scratch", torch.zeros(1000), persistent=False)

    def train_dataloader(self):
        data = torch.randn(32, 32, generator=torch.Generator().manual_seed(2))
        return torch.utils.data.DataLoader(data, batch_size=4)


def raw_bytes(module: nn.Module) -> int:
    return sum(x.nbytes for x in module.state_dict().values())


@pytest.mark.parametrize("compression", [6, 8, 12])
@pytest.mark.parametrize("phases", [PHASES, Phases(admm_start=1, admm_end=1), Phases(interval="step", admm_start=4)])
def test_the_file_is_at_least_as_much_smaller_as_requested(compression, phases, tmp_path):
    module, path = Wide(), tmp_path / "m.muws"
    callback = WeightUnificationCallback(compression=compression, phases=phases, save_to=path)
    probe = Probe(callback)
    fit(module, callback, probe, max_epochs=6)
    callback.verify()
    assert raw_bytes(module) / path.stat().st_size >= compression
    assert callback.saved.compression_ratio >= compression
    loaded = load_compressed(path)
    assert loaded.keys() == module.state_dict().keys()
    for layer in callback.report.layers:
        entry = callback.plan.covered[layer.name]
        counts = entry.structure.counts(entry.grid, entry.shape)
        assert list(counts.values()) == [layer.n_dense, layer.n_unified, layer.n_pruned]
        blocks = entry.grid.split(loaded[layer.name])
        assert int((blocks == 0).all(1).sum()) >= layer.n_pruned
    if compression == 12:  # at 6 and 8 coarse steps are enough
        assert probe.n_checked > 0
        assert sum(layer.n_unified + layer.n_pruned for layer in callback.report.layers) > 0


def test_buffers_keep_their_precision_and_biases_are_stored_in_steps(tmp_path):
    module = Wide()
    fit(module, WeightUnificationCallback(compression=8, phases=PHASES, save_to=tmp_path / "m.muws"), max_epochs=6)
    loaded = load_compressed(tmp_path / "m.muws")
    for name in ("layer.1.running_mean", "layer.1.running_var"):
        x = module.state_dict()[name]
        assert (loaded[name] - x).abs().max() <= 2**-10 * x.abs().max()
    bias = loaded["layer.0.bias"]
    steps = bias / bias[bias != 0].abs().min()
    torch.testing.assert_close(steps, steps.round(), rtol=1e-4, atol=0)


@pytest.mark.filterwarnings(PROVIDED)
@pytest.mark.parametrize("structure", [MicroStructure(), MicroStructure("auto", prune_ratio=(0, 0.5))])
def test_every_checkpoint_leads_to_the_same_bits(structure, tmp_path):
    def callback():
        return WeightUnificationCallback(structure, compression=8, phases=PHASES)

    module, ours = Wide(), callback()
    saver = ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)
    fit(module, ours, saver, max_epochs=6, enable_checkpointing=True)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 6
    for path in paths:
        resumed, again = Wide(), callback()
        fit(resumed, again, max_epochs=6, ckpt_path=path)
        assert again.plan == ours.plan
        assert all(same_bytes(x, resumed.state_dict()[name]) for name, x in module.state_dict().items()), path


@pytest.mark.filterwarnings(PROVIDED)
def test_a_checkpoint_of_another_compression_is_refused_by_name(tmp_path):
    saver = ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)
    callback = WeightUnificationCallback(compression=8, phases=PHASES)
    fit(Wide(), callback, saver, max_epochs=6, enable_checkpointing=True)
    for epoch in (2, 5):
        other = WeightUnificationCallback(compression=6, phases=PHASES)
        with pytest.raises(StateError, match="budget compression is 8 in the checkpoint and 6 in the settings"):
            fit(Wide(), other, max_epochs=7, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
    dense = WeightUnificationCallback(compression=6, phases=PHASES)  # a dense run has not spent its budget
    fit(Wide(), dense, max_epochs=6, ckpt_path=tmp_path / "epoch=0.ckpt")
    dense.verify()


def test_a_second_fit_goes_on_with_the_choice_of_the_first(tmp_path):
    module, path = Wide(), tmp_path / "m.muws"
    callback = WeightUnificationCallback(compression=8, phases=PHASES, save_to=path)
    fit(module, callback, max_epochs=6)
    plan, supports = callback.plan, callback.supports
    fit(module, callback, max_epochs=2)
    assert callback.plan == plan
    assert all(torch.equal(supports[name].kinds, s.kinds) for name, s in callback.supports.items())
    assert callback.saved.compression_ratio >= 8
    other = Wide()
    fit(other, callback, max_epochs=6)  # another model: chosen again
    callback.verify()
    assert callback.saved.compression_ratio >= 8


@pytest.mark.filterwarnings("ignore:training ended in the")
@pytest.mark.parametrize("max_epochs", [1, 3])
def test_a_run_that_ends_early_meets_the_size_too(max_epochs, tmp_path):
    class Stop(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == max_epochs - 1

    module, path = Wide(), tmp_path / "m.muws"
    callback = WeightUnificationCallback(compression=8, phases=PHASES, save_to=path)
    fit(module, callback, Stop(), max_epochs=6)
    callback.verify()
    assert raw_bytes(module) / path.stat().st_size >= 8
    assert all(not entry.structure.is_open for entry in callback.plan.covered.values())


def test_rules_hold_and_the_plan_has_what_the_budget_keeps_dense():
    rules = [
        LayerRule("layer.0.*", structure=MicroStructure((1, 8), prune_ratio=0.5)),
        LayerRule("layer.3.*", structure=MicroStructure((2, 4))),
        LayerRule("layer.4.*", skip=True),
    ]
    callback = WeightUnificationCallback(compression=10, rules=rules, phases=PHASES)
    fit(Wide(), callback, max_epochs=6)
    layers = {layer.name: layer for layer in callback.report.layers}
    assert layers["layer.0.weight"].n_pruned == layers["layer.0.weight"].n_dense == 96 * 32 // 16
    assert layers["layer.3.weight"].block_shape == (2, 4)
    assert "layer.4.weight" not in layers

    callback = WeightUnificationCallback(compression=1.5, phases=PHASES)
    fit(Wide(), callback, max_epochs=6)
    assert {callback.plan.left_out[f"layer.{i}.weight"].reason for i in (0, 3, 4)} == {KEPT}
    assert callback.report.layers == ()
    callback.verify()


@pytest.mark.parametrize("wrong", [1, 0.5, -1, float("nan"), float("inf"), True, "20"])
def test_a_compression_that_is_none_is_refused(wrong):
    with pytest.raises(SettingError, match=r"compression=.* is not allowed: give a finite number above 1"):
        WeightUnificationCallback(compression=wrong)


@pytest.mark.parametrize("structure", [MicroStructure(prune_ratio=0.5), MicroStructure(unify_ratio=0.1), NMStructure()])
def test_ratios_set_by_hand_beside_a_compression_are_refused(structure):
    with pytest.raises(SettingError, match=r"compression=20 chooses the ratios of each weight, and structure=.* sets"):
        WeightUnificationCallback(structure, compression=20)
    callback = WeightUnificationCallback(MicroStructure((2, 8), signs="shared"), compression=20)
    assert callback.structure.block_shape == (2, 8)


def test_a_relative_error_takes_the_place_of_a_size_and_the_file_is_lossless(tmp_path):
    module, path = Wide(), tmp_path / "m.muws"
    callback = WeightUnificationCallback(max_relative_error=0.5, phases=PHASES, save_to=path)
    fit(module, callback, max_epochs=6)
    callback.verify()
    assert sum(layer.n_unified + layer.n_pruned for layer in callback.report.layers) > 0
    loaded = load_compressed(path)
    assert all(same_bytes(x, loaded[name]) for name, x in module.state_dict().items())
    with pytest.raises(SettingError, match=r"max_relative_error=0.5 chooses the ratios .* or leave max_relative_error"):
        WeightUnificationCallback(MicroStructure(prune_ratio=0.5), max_relative_error=0.5)


def test_auto_shapes_and_ranges_are_in_the_report_and_in_the_file(tmp_path):
    module, path = Wide(), tmp_path / "m.muws"
    never = LayerRule("layer.3.*", structure=MicroStructure("auto", prune_ratio=(0, 0), unify_ratio=(0.3, 1)))
    callback = WeightUnificationCallback(MicroStructure("auto"), [never], PHASES, compression=12, save_to=path)
    fit(module, callback, max_epochs=6)
    callback.verify()
    assert raw_bytes(module) / path.stat().st_size >= 12
    shapes = {tensor.name: tensor.block_shape for tensor in inspect_compressed(path).tensors if tensor.block_shape}
    assert shapes == {layer.name: layer.block_shape for layer in callback.report.layers}
    assert shapes == {name: entry.grid.block_shape for name, entry in callback.plan.covered.items()}
    assert "auto" not in str(callback.plan)
    layers = {layer.name: layer for layer in callback.report.layers}
    assert layers["layer.3.weight"].n_pruned == 0 < layers["layer.3.weight"].n_unified


def test_set_ratios_with_auto_need_no_budget(tmp_path):
    module, path = Wide(), tmp_path / "m.muws"
    callback = WeightUnificationCallback(MicroStructure("auto", prune_ratio=0.5), phases=PHASES, save_to=path)
    fit(module, callback, max_epochs=6)
    callback.verify()
    assert all(layer.block_shape in {(4, 4), (1, 16), (16, 1)} for layer in callback.report.layers)
    assert "auto" not in str(callback.plan)
    loaded = load_compressed(path)
    assert all(same_bytes(x, loaded[name]) for name, x in module.state_dict().items())


def test_a_range_without_a_budget_is_refused_at_the_start_of_fit():
    for callback in (
        WeightUnificationCallback(MicroStructure(prune_ratio=(0, 0.3))),
        WeightUnificationCallback(rules=[LayerRule("layer.0.*", structure=MicroStructure(unify_ratio=(0, 0.3)))]),
    ):
        with pytest.raises(
            SettingError, match=r"ratio=\(0.0, 0.3\).* has a range, from which only a budget chooses: give"
        ):
            fit(Wide(), callback, max_epochs=6)


def test_two_budgets_are_refused_when_the_callback_is_made():
    with pytest.raises(SettingError, match=r"compression=20 and max_relative_error=0.3 contradict each other"):
        WeightUnificationCallback(compression=20, max_relative_error=0.3)
    with pytest.raises(SettingError, match="compression=20 and speedup=2 contradict each other"):
        WeightUnificationCallback(compression=20, speedup=2)
    with pytest.raises(SettingError, match="max_relative_error=2 is not allowed: give a number above 0 and below 1"):
        WeightUnificationCallback(max_relative_error=2)


def test_what_cannot_be_met_is_refused_at_the_start_of_fit():
    module = Wide()
    before = {name: x.clone() for name, x in module.state_dict().items()}
    with pytest.raises(SettingError, match=r"compression=900 cannot be reached.* allows [\d.]+ to [\d.]+, so ask"):
        fit(module, WeightUnificationCallback(compression=900), max_epochs=6)
    with pytest.raises(PlanError, match="is covered"):
        fit(module, WeightUnificationCallback(compression=8, rules=[LayerRule(skip=True)]), max_epochs=6)
    assert all(same_bytes(x, before[name]) for name, x in module.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*have no `validation_step`")
@pytest.mark.parametrize("in_yaml", [False, True])
def test_one_flag_is_enough(in_yaml, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["main.py"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6.6 calls what jsonargparse renamed
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    words = ["fit", "--trainer.accelerator=cpu", "--trainer.max_epochs=6", "--trainer.limit_train_batches=4"]
    words += [f"--trainer.{name}=false" for name in off]
    if in_yaml:
        config = tmp_path / "config.yaml"
        config.write_text("compress: {compression: 6, structure: {block_shape: auto, prune_ratio: [0, 0.5]}}\n")
        words += ["--config", str(config)]
    else:
        words += ["--compress.compression", "6"]
    words.append(f"--compress.save_to={tmp_path / 'm.muws'}")
    cli = MuwsCLI(Flat, BoringDataModule, args=words, save_config_callback=None)
    assert raw_bytes(cli.model) / (tmp_path / "m.muws").stat().st_size >= 6
    assert cli.trainer.callbacks[0].structure == (MicroStructure("auto", (0, 0.5)) if in_yaml else MicroStructure())


class Flat(TwoLayers):
    def __init__(self) -> None:
        super().__init__("sgd", 256)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_choose_the_same_and_hold_the_same_bits(strategy, tmp_path):
    one, two = launch("tests.support.budget_worker", tmp_path, STRATEGY=strategy)
    assert one["plan"] == two["plan"]
    assert "open" not in one["plan"]
    assert "auto" not in one["plan"]
    loaded = load_compressed(tmp_path / "m.muws")
    for name, x in one["final"].items():
        assert same_bits(x, two["final"][name]), name
        assert same_bytes(x, loaded[name]), name
    assert one["rounded"] == two["rounded"] == sorted(one["final"])
    assert one["file_ratio"] >= 6
    assert (one["wrote"], two["wrote"]) == (True, False)
