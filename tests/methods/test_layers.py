"""Trainable parts between features."""
import copy

import torch
import torch.nn as nn

from timm_distill.methods._layers import BatchNorm2d, conv1x1, equal_channels


def test_batch_norm_is_torchs_where_a_channel_has_two_values_or_more() -> None:
    own, torchs = BatchNorm2d(3), nn.BatchNorm2d(3)
    for shape in ((2, 3, 1, 1), (1, 3, 2, 1), (4, 3, 5, 5)):
        x = torch.randn(*shape)
        assert torch.equal(own(x), torchs(x))
    torch.testing.assert_close(own.state_dict(), torchs.state_dict())


def test_batch_norm_of_one_value_per_channel_takes_and_keeps_its_running_statistics() -> None:
    norm = BatchNorm2d(3)
    norm(4 + 2 * torch.randn(8, 3, 2, 2))
    state, x = copy.deepcopy(norm.state_dict()), torch.randn(1, 3, 1, 1, requires_grad=True)
    output = norm.train()(x)
    output.sum().backward()
    torch.testing.assert_close(norm.state_dict(), state)
    torch.testing.assert_close(output, norm.eval()(x))
    assert x.grad is not None and norm.weight.grad is not None


def test_channels_get_a_map_only_where_their_numbers_differ() -> None:
    assert isinstance(equal_channels(4, 4), nn.Identity)
    assert equal_channels(4, 6)(torch.randn(2, 4, 3, 3)).shape == (2, 6, 3, 3)
    assert conv1x1(4, 6).bias is None
