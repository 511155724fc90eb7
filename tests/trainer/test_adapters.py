"""LoRA adapters of the package peft: covered like other weights, or left out by a rule; what is frozen stays dense."""

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("peft")
import peft

from lightning_muws import LayerRule, MicroStructure
from lightning_muws import WeightUnificationCallback as LightningCallback
from lightning_muws.errors import PlanError
from tests.support.explicit import PHASES as EPOCHS
from tests.support.huggingface import bert, sentences, trainer
from tests.support.modules import TwoLayers, fit
from tests.support.strategies import same_bits
from tests.trainer.test_huggingface import callback

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory:UserWarning", "ignore:.*is_gradient_checkpointing:FutureWarning"
)
LEFT_OUT = LayerRule("*lora_*", skip=True)


def adapted(model, *targets, **settings):
    """Return a model whose named layers have adapters of rank 4; all else is frozen, but for ``modules_to_save``."""
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=list(targets), **settings))


def frozen(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def test_adapters_are_covered_and_the_frozen_weights_stay_to_the_bit(tmp_path):
    model, used = adapted(bert(), "query", "value"), callback()
    before = frozen(model)
    trainer(tmp_path, model, used, dataset=sentences(22)).train()
    used.verify()
    assert len(used.supports) == 2 * 2  # A and B of two layers
    assert all("lora_" in name for name in used.supports)
    for name, support in used.supports.items():
        weight = model.get_parameter(name).detach()
        assert support.error(weight) == 0
        assert int((weight == 0).sum()) >= weight.numel() // 2
    assert all(same_bits(x, before[name]) for name, x in frozen(model).items())


def test_a_rule_leaves_adapters_out(tmp_path):
    model, used = adapted(bert(), "query", modules_to_save=["classifier"]), callback(rules=[LEFT_OUT])
    trainer(tmp_path, model, used, dataset=sentences(22)).train()
    used.verify()
    assert list(used.supports) == ["base_model.model.classifier.modules_to_save.default.weight"]
    adapters = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert adapters
    assert all((p != 0).all() for p in adapters)


def test_a_rule_that_leaves_all_out_is_refused(tmp_path):
    with pytest.raises(PlanError, match="no parameter of PeftModel is covered"):
        trainer(tmp_path, adapted(bert(), "query"), callback(rules=[LEFT_OUT]), dataset=sentences(22)).train()


def test_lightning_covers_adapters_too():
    module, used = TwoLayers("adam"), LightningCallback(MicroStructure((2, 4), 0.5, 0.25), phases=EPOCHS)
    module.layer = adapted(module.layer, "0")
    fit(module, used, max_epochs=5)
    used.verify()
    assert [name.rpartition("lora_")[2] for name in used.supports] == ["A.default.weight", "B.default.weight"]
