import torch

from esvit_scale import config as configs
from esvit_scale.objective.esvit import EsViT
from tests.objective import cases


def test_dino_equals_esvit_without_regions() -> None:
    given = cases.inputs("dino")
    section = configs.Objective(**{**cases.section("dino"), "name": "esvit", "regions": False})
    esvit, dino = EsViT(cases.C, section).double(), cases.module("dino", given.student)
    esvit.load_state_dict(given.student)
    losses = []
    for module in (esvit, dino):
        with torch.no_grad():
            targets = cases.module("dino", given.teacher).targets(given.teacher_features)
        losses.append(module(given.features, targets, cases.TEMP)[0])
        module.commit()
        losses.append(module(given.features, targets, cases.TEMP)[0])  # with the centre
    assert losses[:2] == losses[2:]
    assert esvit.extra_state().keys() == dino.extra_state().keys() == {"view.values"}


def test_regions_default_depends_on_the_objective() -> None:
    assert configs.Objective().regions
    assert not configs.Objective(name="dino").regions
    assert "leave it out, or take objective.name=esvit" in cases.error_of("dino", objective__regions=True)
    assert cases.error_of("dino") == ""
