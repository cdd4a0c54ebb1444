import pytest
import torch

from esvit_scale.models.heads import Prototypes
from esvit_scale.objective.center import Center
from esvit_scale.objective.esvit import EsViT
from esvit_scale.parallel import collectives

ROWS = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))


def test_update_is_linear_in_the_bottleneck():
    z = torch.randn(10, 3)
    center = Center(0.9)
    center.observe(z.mean(0), ROWS)
    center.commit()
    torch.testing.assert_close(center.values(ROWS), 0.1 * (z @ ROWS.T).mean(0))
    center.observe(z.mean(0), ROWS)
    center.commit()
    torch.testing.assert_close(center.values(ROWS), (0.09 + 0.1) * (z @ ROWS.T).mean(0))


def test_micro_batches_share_the_old_centre_and_update_it_once():
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    whole, parts = Center(0.9), Center(0.9)
    whole.observe(torch.cat([a, b]).mean(0), ROWS)
    for part in (a, b):
        assert (parts.values(ROWS) == 0).all()
        parts.observe(part.mean(0), ROWS)
    whole.commit()
    parts.commit()
    torch.testing.assert_close(whole.values(ROWS), parts.values(ROWS))


def test_skipped_step_does_not_change_the_centre():
    center = Center(0.9)
    center.observe(torch.full((3,), torch.nan), ROWS)
    center.discard()
    center.observe(torch.ones(3), ROWS)
    center.commit()
    torch.testing.assert_close(center.values(ROWS), 0.1 * ROWS.sum(1))
    with pytest.raises(RuntimeError, match="nothing was observed"):
        center.commit()


def test_ranks_exchange_the_bottleneck_not_the_logits(monkeypatch):
    exchanged = []
    monkeypatch.setattr(collectives, "all_reduce_mean_", lambda x: exchanged.append(x.shape) or x.mul_(2))
    center = Center(0.9)
    center.observe(torch.ones(3), ROWS)
    center.commit()
    assert exchanged == [(3,)]
    torch.testing.assert_close(center.values(ROWS), 0.2 * ROWS.sum(1))


def test_centre_is_no_buffer_and_stays_fp32():
    from esvit_scale.config import Objective

    module = EsViT(4, Objective(prototypes=6, head_hidden=4, bottleneck=4)).bfloat16()
    assert not list(module.buffers())
    rows = module.view_head.last_layer(torch.zeros(1, 4), lambda _, rows: rows)
    assert module.view_center.values(rows).dtype == torch.float32
    assert isinstance(module.view_head.last_layer, Prototypes)


def test_state_survives_save_and_load():
    center, other = Center(0.9), Center(0.9)
    assert center.state_dict() == {}
    other.load_state_dict({})
    assert (other.values(ROWS) == 0).all()
    center.observe(torch.ones(3), ROWS)
    center.commit()
    other.load_state_dict(center.state_dict())
    assert torch.equal(other.values(ROWS), center.values(ROWS))
