"""Pictures of layers go to the loggers that take images, at each update, and change nothing of the run."""

import importlib.util
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger

from lightning_muws import Phases, WeightUnificationCallback
from lightning_muws.errors import SettingError
from tests.support.modules import QUIET, STRUCTURE, TwoLayers

PHASES = Phases(admm_start=1, admm_end=3, update_every=1)


class ImageLogger(Logger):
    """A logger with images, in the way of Lightning's WandbLogger."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures: list[tuple[str, np.ndarray, int]] = []

    name = version = "images"
    experiment = None

    def log_hyperparams(self, *args, **kwargs) -> None:
        pass

    def log_metrics(self, metrics, step=None) -> None:
        pass

    def log_image(self, key, images, step=None) -> None:
        self.pictures += [(key, image, step) for image in images]


def fit(callback, logger):
    torch.manual_seed(0)
    model = TwoLayers()
    options = {**QUIET, "logger": logger, "limit_train_batches": 2, "log_every_n_steps": 1}
    trainer = L.Trainer(max_epochs=4, callbacks=[callback], **options)
    trainer.fit(model)
    return model, trainer


class Sketching(WeightUnificationCallback):
    """Draws a picture that is made at once, and remembers what it was given."""

    def __init__(self, **settings) -> None:
        super().__init__(STRUCTURE, phases=PHASES, **settings)
        self.drawn = []

    def drawer(self, *given) -> np.ndarray:
        self.drawn.append(given)
        return np.full((2, 3, 3), len(self.drawn), np.uint8)


def test_each_update_and_the_freezing_draw_the_largest_layers():
    logger, callback = ImageLogger(), Sketching(log_pictures=1)
    model, _ = fit(callback, logger)
    steps = [2, 4, 6]  # the start of ADMM, its update and the projection
    assert len(callback.history) == len(steps) - 1
    assert [(key, step) for key, _, step in logger.pictures] == [("muws/layer.0.weight", step) for step in steps]
    assert [int(picture[0, 0, 0]) for _, picture, _ in logger.pictures] == [1, 2, 3]
    _, weights, _, kinds, histories, captions = zip(*callback.drawn, strict=True)
    assert captions == ("admm, epoch 1", "admm, epoch 2", "retraining, epoch 3")
    assert [len(history) for history in histories] == [0, 1, 2]
    support = callback.supports["layer.0.weight"]
    assert torch.equal(kinds[-1], support.kinds)
    assert torch.equal(support.project(weights[-1]), weights[-1])
    assert {weight.shape for weight in weights} == {model.layer[0].weight.shape}
    both = Sketching(log_pictures=9)
    fit(both, ImageLogger())
    assert [name for name, *_ in both.drawn] == ["layer.0.weight", "layer.2.weight"] * 3


def test_pictures_change_nothing_of_the_run_and_are_off_by_default():
    quiet, drawn = Sketching(), Sketching(log_pictures=2)
    one, _ = fit(quiet, ImageLogger())
    other, _ = fit(drawn, ImageLogger())
    assert not quiet.drawn
    assert drawn.drawn
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_loggers_without_images_are_named_and_left_alone(tmp_path):
    callback = Sketching(log_pictures=2)
    with pytest.warns(UserWarning, match="log_pictures=2 has no effect: none of the Trainer's loggers takes images"):
        fit(callback, CSVLogger(tmp_path))
    assert not callback.drawn


def test_a_missing_matplotlib_is_refused_before_training(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(SettingError, match=r"pip install 'lightning-muws\[plots\]'"):
        fit(Sketching(log_pictures=2), ImageLogger())


@pytest.mark.slow
def test_tensorboard_gets_pictures_and_histograms(tmp_path):
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    from tensorboardX.proto.event_pb2 import Event

    logger = TensorBoardLogger(tmp_path)
    fit(WeightUnificationCallback(STRUCTURE, phases=PHASES, log_pictures=1), logger)
    (file,) = Path(logger.log_dir).glob("events*")
    found = [(value.tag, event.step, value) for event in events(file, Event) for value in event.summary.value]
    images = [(tag, step) for tag, step, value in found if value.HasField("image")]
    histograms = [(tag, step, value.histo.num) for tag, step, value in found if value.HasField("histo")]
    assert images == [("muws/layer.0.weight", step) for step in (2, 4, 6)]
    assert histograms == [("muws/magnitudes/layer.0.weight", step, 512) for step in (2, 4, 6)]
    picture = next(value.image for _, _, value in found if value.HasField("image"))
    assert picture.encoded_image_string.startswith(b"\x89PNG")
    assert (picture.width, picture.height) == (1100, 750)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what mlflow warns of is its own affair
def test_mlflow_gets_pictures(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    from lightning.pytorch.loggers import MLFlowLogger
    from PIL import Image

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(tracking_uri=tmp_path.as_uri())
    fit(Sketching(log_pictures=1), logger)
    files = sorted(tmp_path.glob(f"*/{logger.run_id}/artifacts/images/*.png"))
    assert sorted(file.name.split("+")[:3] for file in files) == [
        ["muws~layer.0.weight", "step", str(step)] for step in (2, 4, 6)
    ]
    assert sorted(Image.open(file).getpixel((0, 0))[0] for file in files) == [1, 2, 3]


def events(file: Path, kind):
    """Yield the records of a TensorBoard file: 8 bytes length, 4 of checksum, the record, 4 of checksum."""
    data = file.read_bytes()
    while data:
        n = int.from_bytes(data[:8], "little")
        yield kind.FromString(data[12 : 12 + n])
        data = data[16 + n :]
