"""Real modules, unchanged, in real Trainers: dense, ADMM, retraining; inside the structure after every step."""

import importlib
import inspect
import os
import pkgutil

import lightning as L
import pytest
import torch
from lightning.pytorch import demos
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel, Net
from lightning.pytorch.demos.lstm import SequenceSampler
from lightning.pytorch.demos.transformer import WikiText2
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_muws import LayerRule, MicroStructure, Penalty, Phases, WeightUnificationCallback
from lightning_muws.structure.kinds import Kind
from tests.support.modules import QUIET, Probe

os.environ["HF_HUB_OFFLINE"] = "1"  # configs only: nothing is fetched

PHASES = Phases(admm_start=1, admm_end=3, update_every=1)
PENALTY = Penalty(rho=0.01, relative=False)
STRUCTURE = MicroStructure((2, 4), prune_ratio=0.5, unify_ratio=0.25)
WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)
N_BATCHES, N_EPOCHS = 2, 5


def expected_names(module: nn.Module, size: int = 8) -> set[str]:
    """Return the matrices of layers that multiply, but for those that are embeddings as well."""
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        if isinstance(part, WEIGHTED)
        for name, p in part.named_parameters(recurse=False)
        if p.ndim >= 2 and p.numel() >= size and id(p) not in embeddings
    }


def traces(module: L.LightningModule) -> dict[str, object]:
    """Return all that the callback might leave on a module."""
    _ = module.hparams  # made when it is first asked for, by any fit
    parts = list(module.named_modules())
    hooks = [key for key in vars(nn.Module()) if "hooks" in key]
    return {
        "parameters": [(name, id(p), p.shape, p.requires_grad) for name, p in module.named_parameters()],
        "state": list(module.state_dict()),
        "kinds": [(name, type(part)) for name, part in parts],
        "attributes": [(name, sorted(vars(part))) for name, part in parts],
        "hooks": [(name, key, len(getattr(part, key))) for name, part in parts for key in hooks],
    }


def compress(
    module: L.LightningModule, data=None, rules=(), structure=STRUCTURE, **options
) -> WeightUnificationCallback:
    """Train a module through all phases and check what is promised of any."""
    torch.manual_seed(0)
    callback = WeightUnificationCallback(structure, rules, PHASES, penalty=PENALTY)
    first, last, before = Probe(callback), Probe(callback), traces(module)
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    options = {**QUIET, "max_epochs": N_EPOCHS, "limit_train_batches": N_BATCHES, "limit_val_batches": 1, **options}
    trainer = L.Trainer(callbacks=[first, callback, last], **options)
    if isinstance(data, L.LightningDataModule) or data is None:
        trainer.fit(module, datamodule=data)
    else:
        validates = type(module).validation_step is not L.LightningModule.validation_step
        trainer.fit(module, data, data if validates else None)
    callback.verify()
    assert traces(module) == before
    assert first.n_checked == last.n_checked == (N_EPOCHS - 3) * N_BATCHES * len(callback.supports)
    for name, support in callback.supports.items():
        weight, entry = module.get_parameter(name).detach(), callback.plan.covered[name]
        blocks, n = support.grid.split(weight), entry.n_blocks
        n_pruned, n_unified = round(entry.structure.prune_ratio * n), round(entry.structure.unify_ratio * n)
        assert int((blocks == 0).all(1).sum()) == n_pruned, name
        magnitudes = blocks[(blocks != 0).all(1)].abs()
        assert int((magnitudes == magnitudes[:, :1]).all(1).sum()) >= n_unified, name
        assert support.counts()[Kind.UNIFIED] == n_unified, name
        assert weight.isfinite().all(), name
        assert not torch.equal(weight, start[name]), name
    return callback


# ---- every LightningModule of lightning.pytorch.demos


def demo_modules() -> dict[str, type[L.LightningModule]]:
    return {
        name: kind
        for home in pkgutil.iter_modules(demos.__path__, f"{demos.__name__}.")
        for name, kind in vars(importlib.import_module(home.name)).items()
        if inspect.isclass(kind) and issubclass(kind, L.LightningModule) and kind.__module__ == home.name
    }


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A tiny text where the demos look for the one that they would fetch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(WikiText2, "download", staticmethod(lambda destination: None))
    (tmp_path / "data").mkdir()
    words = torch.randint(60, (40, 12), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "data" / "wikitext-2.txt").write_text("\n".join(" ".join(f"w{i}" for i in line) for line in words))


def sentences():
    data = WikiText2(block_size=6)
    return DataLoader(data, batch_sampler=SequenceSampler(data, batch_size=2))


# How each is made and what it is fed, where it brings no data that is here.
DEMOS = {
    "BoringModel": ({}, lambda: None, {}),
    "ManualOptimBoringModel": ({}, lambda: None, {}),
    "DemoModel": ({}, BoringDataModule, {}),
    "LightningLSTM": ({"vocab_size": 64}, sentences, {"gradient_clip_val": 0.25}),
    "LightningTransformer": ({"vocab_size": 64}, lambda: None, {}),
}


@pytest.mark.filterwarnings("ignore:.*have no `validation_step`")
@pytest.mark.parametrize("name", demo_modules())
def test_every_demo_of_lightning(name, text):
    settings, data, options = DEMOS[name]  # a demo that is not here is a new one: say what it is fed
    module = demo_modules()[name](**settings)
    callback = compress(module, data(), **options)
    assert set(callback.supports) == expected_names(module)


def test_no_demo_is_forgotten():
    assert {"BoringModel", "ManualOptimBoringModel", "DemoModel"} <= set(demo_modules())
    assert set(DEMOS) == set(demo_modules())
    assert issubclass(demo_modules()["ManualOptimBoringModel"], BoringModel)


# ---- Hugging Face networks, from small configurations


class Wrapped(L.LightningModule):
    """Any network that computes its own loss from keyword arguments."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch, batch_idx):
        return self.network(**batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.network(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


def images(n_classes: int = 4, side: int = 32):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "pixel_values": torch.randn(4, 3, side, side, generator=generator),
            "labels": torch.randint(n_classes, (4,), generator=generator),
        }
        for _ in range(N_BATCHES)
    ]


def tokens(n_words: int = 40):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(n_words, (4, 8), generator=generator) for _ in range(N_BATCHES)]
    return [{"input_ids": batch, "labels": batch} for batch in ids]


def resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4)
    return ResNetForImageClassification(config)


def mobilenet():
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.25, image_size=32, num_labels=4))


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(**small, image_size=32, patch_size=8, num_labels=4))


def bert(kind: str = "BertForMaskedLM"):
    import transformers

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(**small, vocab_size=40, max_position_embeddings=16, num_labels=4)
    return getattr(transformers, kind)(config)


def wav2vec2():
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    convolutions = {"conv_dim": [8, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0}
    labels = {"num_labels": 4, "classifier_proj_size": 8, "mask_time_prob": 0.0}
    return Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**small, **convolutions, **positions, **labels))


@pytest.mark.parametrize(
    ("make", "data", "n_covered"), [(resnet, images, 7), (mobilenet, images, 53), (vit, images, 14), (bert, tokens, 13)]
)
def test_networks_of_hugging_face(make, data, n_covered):
    module = Wrapped(make())
    callback = compress(module, DataLoader(data(), batch_size=None))
    assert set(callback.supports) == expected_names(module)
    assert len(callback.supports) == n_covered


def test_weights_that_are_computed_from_others_are_left_out():
    audio = [
        {"input_values": batch["pixel_values"].flatten(1)[:, :400], "labels": batch["labels"]} for batch in images()
    ]
    module = Wrapped(wav2vec2())
    module.network(**audio[0])  # the network hangs hooks on itself when it first runs
    callback = compress(module, DataLoader(audio, batch_size=None))
    assert set(callback.supports) == expected_names(module)
    assert len(callback.supports) == 2 + 1 + 6 + 2
    (name,) = (n for n in callback.plan.left_out if n.endswith("original1"))
    assert callback.plan.left_out[name].reason == "computed from other parameters"


def test_a_tied_embedding_is_left_out_or_structured_in_both_places():
    name = "network.bert.embeddings.word_embeddings.weight"
    module = Wrapped(bert())
    head = module.network.cls.predictions.decoder
    assert head.weight is module.get_parameter(name)
    callback = compress(module, DataLoader(tokens(), batch_size=None))
    assert callback.plan.left_out[name].reason == "an embedding"
    assert head.weight is module.get_parameter(name)

    module = Wrapped(bert())
    rule = LayerRule("*word_embeddings.weight", "Embedding", MicroStructure((1, 8), prune_ratio=0.25))
    callback = compress(module, DataLoader(tokens(), batch_size=None), [rule])
    head = module.network.cls.predictions.decoder
    assert head.weight is module.get_parameter(name)
    assert callback.supports[name].error(head.weight.detach()) == 0
    assert int((head.weight == 0).sum()) == 20 * 8


# ---- kinds of networks that people write


class Classifier(L.LightningModule):
    """A network and its cross entropy."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.save_hyperparameters(ignore=["network"])

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.network(batch[0]), batch[1]), prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.05, total_steps=self.trainer.estimated_stepping_batches
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Recurrent(nn.Module):
    """Words, a recurrent net over them, and a class from its last state."""

    def __init__(self, kind: type[nn.RNNBase], **options) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 12)
        self.layers = kind(12, 16, num_layers=2, batch_first=True, bidirectional=True, **options)
        self.head = nn.Linear(2 * options.get("proj_size", 16), 4)

    def forward(self, x):
        return self.head(self.layers(self.words(x))[0][:, -1])


def audio_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 8, 80, stride=16), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(4),
        nn.Conv1d(8, 16, 3, dilation=2), nn.BatchNorm1d(16), nn.ReLU(),
        nn.Conv1d(16, 16, 3, groups=4), nn.GroupNorm(4, 16), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def labelled(*shape: int, n_words: int = 0):
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randint(n_words, shape, generator=generator) if n_words else torch.randn(shape, generator=generator)
        for _ in range(N_BATCHES)
    ]
    return DataLoader([(x, torch.arange(len(x)) % 4) for x in inputs], batch_size=None)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(
    ("network", "data", "n_covered"),
    [
        (lambda: Recurrent(nn.LSTM), lambda: labelled(4, 6, n_words=40), 9),
        (lambda: Recurrent(nn.LSTM, proj_size=8), lambda: labelled(4, 6, n_words=40), 13),
        (lambda: Recurrent(nn.GRU), lambda: labelled(4, 6, n_words=40), 9),
        (audio_network, lambda: labelled(4, 1, 2000), 4),
        (Net, lambda: labelled(4, 1, 28, 28), 4),
    ],
    ids=["LSTM", "LSTM with projections", "GRU", "audio", "convolutional"],
)
def test_classifiers(network, data, n_covered):
    module = Classifier(network())
    callback = compress(module, data(), log_every_n_steps=1)
    assert set(callback.supports) == expected_names(module)
    assert len(callback.supports) == n_covered


class Autoencoder(L.LightningModule):
    """Convolutions down and transposed ones up again."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GELU(), nn.Conv2d(8, 16, 3, 2, 1), nn.Flatten())
        self.code, self.decode = nn.Linear(16 * 16, 8), nn.Linear(8, 16 * 16)
        up = nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.GELU(), nn.ConvTranspose2d(8, 3, 4, 2, 1)
        self.decoder = nn.Sequential(nn.Unflatten(1, (16, 4, 4)), *up)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.decoder(self.decode(self.code(self.encoder(batch[0])))), batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3, weight_decay=1e-4)


@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}], ids=str)
def test_an_autoencoder(options):
    module = Autoencoder()
    callback = compress(module, labelled(4, 3, 16, 16), **options)
    assert set(callback.supports) == expected_names(module)


class Gan(L.LightningModule):
    """A convolutional generator and a critic, stepped by hand, each frozen while the other one learns."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(8, 16 * 16), nn.Unflatten(1, (16, 4, 4)), nn.BatchNorm2d(16), nn.ReLU(),
            nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 3, 4, 2, 1),
        )  # fmt: skip
        self.critic = nn.Sequential(
            nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 16, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Flatten(), nn.Linear(16 * 16, 1),
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        real, (of_generator, of_critic) = batch[0], self.optimizers()
        noise = torch.randn(len(real), 8)
        self.toggle_optimizer(of_generator)
        self.learn(of_generator, F.softplus(-self.critic(self.generator(noise))).mean())
        self.untoggle_optimizer(of_generator)
        self.toggle_optimizer(of_critic)
        fake = self.generator(noise).detach()
        self.learn(of_critic, F.softplus(self.critic(fake)).mean() + F.softplus(-self.critic(real)).mean())
        self.untoggle_optimizer(of_critic)
        for schedule in self.lr_schedulers():
            schedule.step()

    def learn(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self):
        optimizers = [torch.optim.Adam(part.parameters(), 2e-4, (0.5, 0.999)) for part in (self.generator, self.critic)]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99) for optimizer in optimizers]


def test_a_gan_with_manual_optimization():
    module = Gan()
    callback = compress(module, labelled(4, 3, 16, 16))
    assert set(callback.supports) == expected_names(module) - {"critic.5.weight"}
    assert callback.plan.left_out["critic.5.weight"].reason == "smaller than one block of (2, 4)"  # one output
    assert len(callback.supports) == 5
