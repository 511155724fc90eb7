"""A model as a folder of the Hub: the same network again, the card's numbers, refusals, and a Hub on this machine."""

import json
import subprocess
import sys

import pytest
import torch
import transformers

from lightning_muws import MicroStructure, dry_run, inspect_compressed, load_compressed, save_compressed
from lightning_muws.commands.main import main
from lightning_muws.errors import FormatError, SettingError, StateError
from lightning_muws.hub import load_pretrained, push_folder, save_to_hub_folder
from lightning_muws.structure.plan import make_plan
from tests.support.fake_hub import SHA, fake_hub
from tests.support.huggingface import STRUCTURE, bert

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
IDS = torch.arange(16).view(2, 8)


@pytest.fixture
def model():
    found = bert().eval()
    found.bert.encoder.layer[0].output.dense.weight.data = STRUCTURE.project(
        found.bert.encoder.layer[0].output.dense.weight.data
    )
    return found


@pytest.fixture
def folder(model, tmp_path):
    save_to_hub_folder(model, tmp_path / "new" / "folder", accuracy={"accuracy": 0.912})
    return tmp_path / "new" / "folder"


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def test_the_folder_is_the_network(model, folder):
    loaded = load_pretrained(str(folder))
    assert type(loaded) is type(model)
    assert not loaded.training
    for name, x in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], x), name
    assert torch.equal(logits(loaded), logits(model))
    assert not any(x.is_meta for x in (*loaded.parameters(), *loaded.buffers()))


def test_tied_weights_and_half_precision_come_back(tmp_path):
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 50}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval().to(torch.bfloat16)
    report = save_to_hub_folder(model, tmp_path)
    assert report.dense_bytes == 2 * sum(p.numel() for p in model.parameters())  # the tied weight once
    loaded = load_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(model))


def test_the_card_has_the_numbers(model, folder):
    card, info = (folder / "README.md").read_text(), inspect_compressed(folder / "model.muws")
    assert card.startswith("---\ntags:\n- muws\n")
    assert f"| `model.muws` | {(folder / 'model.muws').stat().st_size:,} bytes |" in card
    assert f"| compression ratio | {info.compression_ratio:.1f} |" in card
    counts = torch.tensor([x.counts for x in info.tensors]).sum(0)
    for kind, n in zip(("dense", "unified", "pruned"), counts.tolist(), strict=True):
        assert f"| {kind} blocks | {n / int(counts.sum()):.1%} |" in card
    assert "| accuracy | 0.912 |" in card
    code = card.split("```python\n")[1].split("```")[0].replace("path or name of this repository", str(folder))
    scope = {}
    exec(code, scope)  # noqa: S102  the card's own code is what is tested
    assert torch.equal(logits(scope["model"]), logits(model))


def test_a_plan_and_a_size_are_kept(model, tmp_path):
    plan = make_plan(model, MicroStructure((2, 4), prune_ratio=0.5))
    report = save_to_hub_folder(model, tmp_path, plan=plan, compression=6)
    assert report.compression_ratio >= 6
    shapes = {x.name: x.block_shape for x in report.tensors}
    assert all(shapes[name] == (2, 4) for name in plan.covered)
    assert load_pretrained(tmp_path).num_parameters() == model.num_parameters()


class Tokens:
    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def test_a_tokenizer_is_saved_beside_it(model, tmp_path):
    save_to_hub_folder(model, tmp_path, tokenizer=Tokens())
    assert {x.name for x in tmp_path.iterdir()} == {"README.md", "config.json", "model.muws", "tokenizer.json"}


def test_what_is_no_such_folder_is_refused(model, folder, tmp_path):
    with pytest.raises(SettingError, match="Linear has no configuration that can be saved: give a PreTrainedModel"):
        save_to_hub_folder(torch.nn.Linear(2, 2), tmp_path)
    with pytest.raises(SettingError, match=r"has no config\.json: give a folder that save_to_hub_folder wrote"):
        load_pretrained(tmp_path)
    with pytest.raises(SettingError, match="is no folder: give one, or the name of a repository"):
        load_pretrained(tmp_path / "no")
    with pytest.raises(SettingError, match=r"has no model\.muws: write it with save_to_hub_folder first"):
        push_folder(tmp_path, "some/model")
    with pytest.raises(FormatError, match="at most max_bytes=10 are allowed"):
        load_pretrained(folder, max_bytes=10)
    state = load_compressed(folder / "model.muws")
    del state["classifier.weight"]
    save_compressed(dict(state), folder / "model.muws")
    with pytest.raises(StateError, match=r"does not fit BertForSequence.* at 1 tensors, the first one 'classifier"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": ["Trainer"]}, "names the class 'Trainer', which is no model of this version"),
        ({"architectures": None}, "names the class ''"),
        ({"model_type": "no_such_type"}, "is no configuration that transformers reads"),
    ],
)
def test_a_configuration_of_another_kind_is_refused(change, says, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(SettingError, match=says):
        load_pretrained(folder)


@pytest.mark.slow
def test_a_process_without_lightning_loads_it(model, folder, tmp_path):
    code = (
        "import sys, torch\n"
        "from lightning_muws.hub import load_pretrained\n"
        f"model = load_pretrained({str(folder)!r})\n"
        "with torch.no_grad():\n"
        f"    torch.save(model(input_ids=torch.arange(16).view(2, 8)).logits, {str(tmp_path / 'logits.pt')!r})\n"
        "assert not {'lightning', 'pytorch_lightning'} & set(sys.modules), 'Lightning was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603  our own code
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model))


def test_a_hub_gets_the_folder_and_gives_it_back(model, folder, tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    with fake_hub() as (url, held):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        assert push_folder(folder, "some/model") == f"{url}/some/model/commit/{SHA}"
        assert held.files == {path.name: path.read_bytes() for path in folder.iterdir()}
        held.files["pytorch_model.bin"] = b"not for us"
        assert torch.equal(logits(load_pretrained("some/model")), logits(model))
        assert not [line for line in held.asked if "pytorch_model" in line]
        held.files.clear()
        with pytest.raises(SettingError, match=r"some/none has no config\.json"):
            load_pretrained("some/none", revision="main")


def test_a_dry_run_needs_the_configuration_alone(folder, model, capsys):
    (folder / "model.muws").unlink()
    assert main(["dry-run", str(folder), "--compression", "20", "--ranks", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == dry_run(model, compression=20, n_ranks=4).to_dict()
    assert main(["dry-run", str(folder), "--prune-ratio", "0.5", "--block", "8x2"]) == 0
    assert "covered weights" in capsys.readouterr().out
    assert main(["dry-run", str(folder)]) == 2
    assert "change the ratios or the rules" in capsys.readouterr().err
    (folder / "config.json").unlink()
    assert main(["dry-run", str(folder), "--compression", "20"]) == 2
    assert "no configuration that transformers reads" in capsys.readouterr().err


def test_seven_billion_weights_take_no_memory():
    config = transformers.LlamaConfig(architectures=["LlamaForCausalLM"], dtype="bfloat16")  # the defaults have 6.7e9
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    found = dry_run(empty, compression=20, n_ranks=8)
    assert found.n_weights == 6_738_415_616
    assert found.file_bytes == 2 * found.n_weights // 20
    assert found.memory["admm"] == pytest.approx((4 + 1 / 16) * found.n_covered / 8)
