import torch

from esvit_scale.models.drop_path import drop_keys, keep_scales


def test_keys_are_in_crop_order_and_depend_only_on_their_image():
    all_keys = drop_keys(1, 7, torch.arange(12), 3).view(3, 12)
    half = drop_keys(1, 7, torch.arange(6, 12), 3).view(3, 6)
    assert torch.equal(all_keys[:, 6:], half)  # a second rank's images
    assert torch.equal(drop_keys(1, 7, torch.tensor([5]), 3), all_keys[:, 5])
    assert all_keys.unique().numel() == 36


def test_keys_change_with_seed_and_step():
    positions = torch.arange(50)
    base = drop_keys(0, 0, positions, 2)
    assert not (base == drop_keys(1, 0, positions, 2)).any()
    assert not (base == drop_keys(0, 1, positions, 2)).any()
    assert not (drop_keys(0, 1, positions, 2) == drop_keys(1, 0, positions, 2)).any()


def test_known_values_are_reproduced():
    assert drop_keys(0, 0, torch.tensor([0, 1]), 2).tolist() == KNOWN


KNOWN = [2391539541053276776, -7536426547905671131, 920862675595841680, 5396103473067506702]


def test_drop_rates_are_unbiased_and_branches_independent():
    keys = drop_keys(0, 3, torch.arange(20000), 2)
    scales = keep_scales(keys, torch.tensor([0.0, 0.1, 0.5]))
    assert scales.shape == (3, 2, 40000)
    assert (scales[0] == 1).all()
    for block, rate in ((1, 0.1), (2, 0.5)):
        dropped = scales[block] == 0
        assert ((dropped.float().mean(1) - rate).abs() < 0.012).all()
        assert torch.allclose(scales[block][~dropped], torch.tensor(1 / (1 - rate)))
        assert ((scales[block].mean(1) - 1).abs() < 0.02).all()  # unbiased
    both = ((scales[2, 0] == 0) & (scales[2, 1] == 0)).float().mean()
    assert abs(both - 0.25) < 0.012
    across = ((scales[2, 0] == 0) & (scales[1, 0] == 0)).float().mean()
    assert abs(across - 0.05) < 0.006
