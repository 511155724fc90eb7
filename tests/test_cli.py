"""The command line: flags, nested rules, files, the fragment, short flags; help, round trips and misspelt keys."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, DemoModel

from lightning_muws import LayerRule, MicroStructure, WeightUnificationCallback, load_compressed
from lightning_muws.cli import MuwsCLI

pytestmark = pytest.mark.filterwarnings("ignore:.*have no `validation_step`")
EXAMPLES = Path(__file__).parents[1] / "examples"
OFF = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
SIZE = ("accelerator=cpu", "max_epochs=4", "limit_train_batches=4", "limit_val_batches=1")
RUN = [
    "fit",
    "--seed_everything=0",
    *(f"--trainer.{size}" for size in SIZE),
    *(f"--trainer.{name}=false" for name in OFF),
]
US = "--trainer.callbacks+=lightning_muws.WeightUnificationCallback"
SHAPE = "--trainer.callbacks.structure.block_shape=[2,4]"


@pytest.fixture(autouse=True)
def called_alone(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6.6 calls what jsonargparse renamed


def run(*words: str, cli: type[LightningCLI] = LightningCLI, start: list[str] = RUN) -> WeightUnificationCallback:
    trainer = cli(DemoModel, BoringDataModule, args=[*start, *words], save_config_callback=None).trainer
    (callback,) = (c for c in trainer.callbacks if isinstance(c, WeightUnificationCallback))
    return callback


def test_flags():
    callback = run(US, SHAPE, "--trainer.callbacks.structure.prune_ratio=0.5", "--trainer.callbacks.phases.admm_end=2")
    assert callback.structure == MicroStructure((2, 4), prune_ratio=0.5)
    assert callback.phases.admm_end == 2
    assert callback.phase == "retraining"
    callback.verify()


def test_nested_rules_as_json():
    rules = (
        '[{"name": "l1.*", "structure": {"block_shape": [1, 8], "prune_ratio": 0.5}}, {"name": "*.bias", "skip": true}]'
    )
    callback = run(US, f"--trainer.callbacks.rules={rules}", "--trainer.callbacks.phases.admm_end=0.5")
    assert callback.rules == (LayerRule("l1.*", structure=MicroStructure((1, 8), 0.5)), LayerRule("*.bias", skip=True))
    assert isinstance(callback.phases.admm_end, float)


def test_rules_one_by_one():
    one, two = '{"name": "l1.weight", "structure": {"prune_ratio": 0.5}}', '{"name": "*.bias", "skip": true}'
    callback = run(US, f"--trainer.callbacks.rules+={one}", f"--trainer.callbacks.rules+={two}")
    assert [rule.name for rule in callback.rules] == ["l1.weight", "*.bias"]


def test_rules_from_a_file():
    callback = run(
        US, f"--trainer.callbacks.rules={EXAMPLES / 'rules.yaml'}", "--trainer.callbacks.structure.prune_ratio=0.5"
    )
    assert callback.rules == (
        LayerRule("l1.weight", structure=MicroStructure((1, 8), 0.25, 0.25)), LayerRule("*.bias", skip=True)
    )  # fmt: skip


def test_a_whole_callback_from_a_file():
    callback = run(f"--trainer.callbacks+={EXAMPLES / 'whole_callback.yaml'}")
    assert callback.retraining.unified == "frozen"
    assert callback.structure.block_shape == (2, 4)


def test_the_fragment_keeps_the_user_s_callbacks(tmp_path):
    user = tmp_path / "user.yaml"
    user.write_text("trainer:\n  callbacks:\n    - class_path: lightning.pytorch.callbacks.EMAWeightAveraging\n")
    args = [RUN[0], "--config", str(user), "--config", str(EXAMPLES / "compress.yaml"), *RUN[1:]]
    trainer = LightningCLI(DemoModel, BoringDataModule, args=args, save_config_callback=None).trainer
    kinds = [type(callback) for callback in trainer.callbacks]
    assert EMAWeightAveraging in kinds
    assert WeightUnificationCallback in kinds


def test_short_flags():
    rules = f"--compress.rules={EXAMPLES / 'rules.yaml'}"
    callback = run("--compress.structure.prune_ratio=0.5", rules, "--compress.phases.admm_end=2", cli=MuwsCLI)
    assert callback.rules[0].structure == MicroStructure((1, 8), 0.25, 0.25)
    callback.verify()


def test_flags_alone_are_enough_for_a_file(tmp_path):
    words = ("--compress.structure.prune_ratio=0.5", "--compress.phases.admm_end=2")
    callback = run(*words, f"--compress.save_to={tmp_path / 'm.muws'}", cli=MuwsCLI)
    module = DemoModel()
    module.load_state_dict(load_compressed(tmp_path / "m.muws"))
    assert int((module.l1.weight == 0).sum()) == callback.report.layers[0].n_pruned * 16
    run(
        US, SHAPE, "--trainer.callbacks.structure.prune_ratio=0.5", f"--trainer.callbacks.save_to={tmp_path / 'n.muws'}"
    )
    assert load_compressed(tmp_path / "n.muws").keys() == module.state_dict().keys()


def test_short_settings_in_yaml(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("compress: {structure: {block_shape: [2, 4], prune_ratio: 0.5}, phases: {admm_end: 2}}\n")
    assert run("--config", str(config), cli=MuwsCLI).structure.prune_ratio == 0.5


def printed(capsys, *words: str, cli: type[LightningCLI] = LightningCLI) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli(DemoModel, BoringDataModule, args=[*RUN, *words], save_config_callback=None)
    out, err = capsys.readouterr()
    return ended.value.code, out, err


FIELDS = {
    "structure.block_shape": "Outputs and inputs of a block",
    "structure.prune_ratio": "Share of the blocks that are all zero",
    "structure.unify_ratio": "share one magnitude",
    "structure.signs": "each weight keeps its sign",
    "phases.interval": "What times count",
    "phases.admm_start": "When ADMM starts",
    "phases.admm_end": "retraining starts",
    "phases.update_every": "Time between two Z/U updates",
    "phases.method": "brings the weights near their structure",
    "penalty.rho": "Penalty factor at the start",
    "penalty.rho_growth": "Factor on rho",
    "penalty.rho_max": "Where rho stops growing",
    "penalty.relative": "divided by the squared norm",
    "penalty.balance": "rho always grows",
    "retraining.unified": "the one magnitude of a unified block trains",
    "retraining.schedule": "Learning rate schedule",
    "retraining.lr": "Learning rate at the beginning",
    "rules": "Other structures for some layers",
    "validate_projected": "validate the network with projected weights",
    "save_to": "File to write at the end of fit",
    "log_pictures": "the largest ones, to draw",
}


@pytest.mark.parametrize(
    ("cli", "words", "prefix"),
    [
        (LightningCLI, ["--trainer.callbacks.help=lightning_muws.WeightUnificationCallback"], "--trainer.callbacks"),
        (MuwsCLI, ["--help"], "--compress"),
    ],
)
def test_help_shows_every_nested_field_with_its_text(capsys, cli, words, prefix):
    code, out, _ = printed(capsys, *words, cli=cli)
    out = " ".join(out.split())
    assert code == 0
    for field, text in FIELDS.items():
        assert f"{prefix}.{field}" in out
        assert text in out, field


@pytest.mark.parametrize("cli", [LightningCLI, MuwsCLI])
def test_a_printed_configuration_is_read_back(capsys, tmp_path, cli):
    words = ["--compress.structure.prune_ratio=0.5", "--compress.phases.admm_end=2"]
    if cli is LightningCLI:
        words = [US, *(word.replace("--compress", "--trainer.callbacks") for word in words)]
    code, out, _ = printed(capsys, *words, "--print_config", cli=cli)
    assert code == 0
    settings = yaml.safe_load(out)
    ours = settings["compress"] if cli is MuwsCLI else settings["trainer"]["callbacks"][0]["init_args"]
    assert ours["structure"] == {"block_shape": [4, 4], "prune_ratio": 0.5, "unify_ratio": 0.0, "signs": "free"}
    config = tmp_path / "config.yaml"
    config.write_text(out)
    callback = run("--config", str(config), cli=cli, start=["fit"])
    assert (callback.structure.prune_ratio, callback.phases.admm_end) == (0.5, 2)


@pytest.mark.parametrize(
    ("cli", "word", "says"),
    [
        (MuwsCLI, "--compress.phases.admm_ende=2", "admm_ende"),
        (MuwsCLI, '--compress.rules=[{"nam": "x"}]', "nam"),
        (MuwsCLI, "--compress.structure.prune_ratio=half", "prune_ratio"),
        (MuwsCLI, "--compress.structure.prune_ratio=1.5", "prune_ratio=1.5 is not allowed"),
        (LightningCLI, "--trainer.callbacks.phases.admm_ende=2", "admm_ende"),
        (LightningCLI, "--trainer.callbacks.structure.prune_ratio=1.5", "prune_ratio"),
        (LightningCLI, '--trainer.callbacks.rules=[{"nam": "x"}]', "nam"),
        (LightningCLI, "--trainer.callbacks.structur.prune_ratio=0.5", "structur"),
        (MuwsCLI, "--compress.structur.prune_ratio=0.5", "structur"),
    ],
)
def test_wrong_settings_name_the_field(capsys, cli, word, says):
    words = [word] if cli is MuwsCLI else [US, word]
    try:
        code, out, err = printed(capsys, *words, cli=cli)
    except Exception as error:
        code, out, err = 2, "", str(error)
    assert code == 2
    assert says in out + err


def test_the_configuration_is_saved_beside_the_logs(tmp_path):
    start = [word for word in RUN if "logger" not in word]
    words = [
        "--compress.structure.prune_ratio=0.5",
        "--trainer.logger=CSVLogger",
        f"--trainer.logger.save_dir={tmp_path}",
        "--trainer.log_every_n_steps=1",
    ]
    MuwsCLI(DemoModel, BoringDataModule, args=[*start, *words])
    (saved,) = tmp_path.rglob("config.yaml")
    assert yaml.safe_load(saved.read_text())["compress"]["structure"]["prune_ratio"] == 0.5


def test_settings_of_files_are_the_settings_of_code():
    parsed = yaml.safe_load((EXAMPLES / "compress.yaml").read_text())["trainer"]["callbacks+"][0]["init_args"][
        "structure"
    ]
    parsed["block_shape"] = tuple(parsed["block_shape"])
    assert MicroStructure(**parsed) == MicroStructure((4, 4), 0.5, 0.25)
    assert torch.equal(
        MicroStructure(**parsed).project(torch.ones(8, 8)), MicroStructure((4, 4), 0.5, 0.25).project(torch.ones(8, 8))
    )
