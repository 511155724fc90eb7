"""The callback's own arguments: a wrong one is one clear error at once, before any training."""

import inspect
import re
from pathlib import Path

import pytest

import lightning_muws.pytorch_lightning
from lightning_muws import LayerRule, MicroStructure, Phases, Retraining, WeightUnificationCallback
from lightning_muws.errors import MuwsError, SettingError

BOTH = [WeightUnificationCallback, lightning_muws.pytorch_lightning.WeightUnificationCallback]
RULE = LayerRule("l1.*", skip=True)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"prune_ratio": 0.8}, "has no setting prune_ratio: give structure=MicroStructure(prune_ratio=0.8)"),
        ({"block_shape": (2, 4)}, "has no setting block_shape: give structure=MicroStructure(block_shape=(2, 4))"),
        ({"admm_end": 5}, "has no setting admm_end: give phases=Phases(admm_end=5)"),
        ({"rho": 0.1}, "has no setting rho: give penalty=Penalty(rho=0.1)"),
        ({"unified": "frozen"}, "has no setting unified: give retraining=Retraining(unified='frozen')"),
        ({"skip": True}, "has no setting skip: give rules=[LayerRule(skip=True)]"),
        ({"save_path": "m.muws"}, "has no setting save_path: the nearest is save_to; all are structure, rules, "),
        ({"colour": 1}, "has no setting colour; all are structure, rules, "),
    ],
)
def test_an_unknown_setting_is_named_with_its_home(kind, given, says):
    with pytest.raises(SettingError, match=re.escape(f"WeightUnificationCallback {says}")) as refused:
        kind(**given)
    assert "CompressionHooks" not in str(refused.value)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"structure": 0.8}, "structure=0.8 is not allowed: give a structure, such as MicroStructure(prune_ratio=0.8)"),
        ({"structure": MicroStructure}, "structure=<class 'lightning_muws.structure.micro.MicroStructure'> is not"),
        ({"structure": None}, "structure=None is not allowed: give a structure"),
        ({"structure": {"prune_ratio": 0.8}}, "structure={'prune_ratio': 0.8} is not allowed: give a structure"),
        ({"rules": RULE}, "is not allowed: give a list, such as [LayerRule("),
        ({"rules": None}, "rules=None is not allowed: give a list, such as [LayerRule("),
        ({"rules": "l1.*"}, "rules='l1.*' is not allowed: give a list, such as [LayerRule("),
        ({"rules": {"name": "l1.*"}}, "rules={'name': 'l1.*'} is not allowed: give a list, such as [LayerRule("),
        ({"rules": [{"name": "l1.*"}]}, "rules has {'name': 'l1.*'}, only rules are allowed: give LayerRule("),
        ({"rules": [RULE, "l1.*"]}, "rules has 'l1.*', only rules are allowed: give LayerRule("),
        ({"phases": 5}, "phases=5 is not allowed: give a Phases, such as Phases("),
        ({"phases": Phases}, "is not allowed: give a Phases, such as Phases("),
        ({"phases": {"admm_end": 3}}, "phases={'admm_end': 3} is not allowed: give a Phases, such as Phases("),
        ({"retraining": "tied"}, "retraining='tied' is not allowed: give a Retraining, such as Retraining("),
        ({"penalty": 0.1}, "penalty=0.1 is not allowed: give a Penalty, such as Penalty("),
        ({"validate_projected": "no"}, "validate_projected='no' is not allowed: give True or False"),
        ({"validate_projected": 1}, "validate_projected=1 is not allowed: give True or False"),
        ({"log_pictures": -1}, "log_pictures=-1 is not allowed: give the number of layers to draw, such as 8, or 0"),
        ({"log_pictures": True}, "log_pictures=True is not allowed: give the number of layers to draw"),
        ({"save_to": 3}, "save_to=3 is not allowed: give the name of a .muws file, or '' for none"),
        ({"save_to": None}, "save_to=None is not allowed: give the name of a .muws file, or '' for none"),
        ({"save_to": True}, "save_to=True is not allowed: give the name of a .muws file, or '' for none"),
        ({"save_to": "m.pt"}, "save_to='m.pt' is not allowed: the name must end in .muws, such as 'm.muws'"),
        ({"save_to": Path("runs") / "m"}, "the name must end in .muws, such as '" + str(Path("runs") / "m.muws")),
        ({"save_to": Path()}, "is not allowed: the name must end in .muws, such as 'model.muws'"),
    ],
    ids=str,
)
def test_a_wrong_type_is_refused_when_the_callback_is_made(kind, given, says):
    with pytest.raises(SettingError, match=re.escape(says)):
        kind(**given)


def test_a_number_in_place_of_the_structure_is_refused():
    with pytest.raises(SettingError, match=re.escape("structure=0.8 is not allowed")):
        WeightUnificationCallback(0.8)


def test_too_many_arguments_are_refused_in_our_words():
    with pytest.raises(MuwsError, match=r"WeightUnificationCallback was given .* positional arguments") as refused:
        WeightUnificationCallback(*range(20))
    assert "CompressionHooks" not in str(refused.value)


@pytest.mark.parametrize("rules", [[RULE], (RULE,)], ids=["list", "tuple"])
@pytest.mark.parametrize("save_to", ["", "m.muws", "M.MUWS", Path("a") / "m.muws"])
def test_what_fits_is_kept(rules, save_to):
    callback = WeightUnificationCallback(MicroStructure(prune_ratio=0.5), rules, save_to=save_to)
    assert callback.structure == MicroStructure(prune_ratio=0.5)
    assert callback.rules == tuple(rules)
    assert callback.save_to == save_to
    assert callback.retraining == Retraining()


@pytest.mark.parametrize("kind", BOTH)
def test_tools_see_the_settings_with_their_types(kind):
    parameters = list(inspect.signature(kind).parameters.values())
    assert [p.name for p in parameters][:2] == ["structure", "rules"]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty for p in parameters)
