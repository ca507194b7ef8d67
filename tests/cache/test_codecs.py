"""Stored forms of a teacher's outputs, and the bounds of what they lose."""
import math

import pytest
import torch
import torch.nn.functional as F

from timm_distill.cache.codecs import ByteCodec, HalfCodec, TopKCodec, feature_codec, logits_codec, spread_of
from timm_distill.cache.table import table_bytes
from timm_distill.errors import UsageError


def teacher_logits(count: int = 8, classes: int = 1000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, classes, generator=generator)
    return logits + 9 * torch.rand(count, classes, generator=generator) ** 40  # a few classes stand out


@pytest.mark.parametrize('temperature', [1., 2., 4., 8.])
def test_softmax_of_the_kept_classes_is_exact_and_the_rest_keeps_its_mass(temperature: float) -> None:
    logits = teacher_logits()
    codec = TopKCodec(1000, 10, temperature)
    decoded = codec.decode(codec.encode(logits))
    true, read = F.softmax(logits / temperature, 1), F.softmax(decoded / temperature, 1)
    kept = logits.topk(10).indices
    torch.testing.assert_close(read.gather(1, kept), true.gather(1, kept), rtol=6e-3, atol=0)
    rest = 1 - true.gather(1, kept).sum(1)
    torch.testing.assert_close(1 - read.gather(1, kept).sum(1), rest, rtol=6e-3, atol=0)


@pytest.mark.parametrize('temperature', [1.5, 3., 6., 20.])
def test_temperatures_between_those_stored_are_close(temperature: float) -> None:
    logits = teacher_logits()
    codec = TopKCodec(1000, 10, temperature)
    read = F.softmax(codec.decode(codec.encode(logits)) / temperature, 1)
    kept = logits.topk(10).indices
    torch.testing.assert_close(
        read.gather(1, kept), F.softmax(logits / temperature, 1).gather(1, kept), rtol=0.03, atol=0)


@pytest.mark.parametrize('temperature', [1., 4.])
@pytest.mark.parametrize('scale', [0.1, 1., 3.])
def test_divergence_and_its_gradient_stay_within_the_stated_bounds(temperature: float, scale: float) -> None:
    logits = teacher_logits()
    student = scale * torch.randn(8, 1000, generator=torch.Generator().manual_seed(1))
    codec = TopKCodec(1000, 10, temperature)
    log_q = F.log_softmax(student / temperature, 1)
    p, read = (F.softmax(x / temperature, 1) for x in (logits, codec.decode(codec.encode(logits))))
    difference = (p * (p.log() - log_q)).sum(1) - (read * (read.log() - log_q)).sum(1)
    others = torch.ones_like(p).scatter(1, logits.topk(10).indices, 0).bool()
    rest = (p * others).sum(1)
    spread = log_q.masked_fill(~others, -math.inf).amax(1) - log_q.masked_fill(~others, math.inf).amin(1)
    rounding = 0.01
    assert (difference.abs() <= rest * (math.log(990) + spread) + rounding).all()
    assert ((p - read).abs().sum(1) <= 2 * rest + rounding).all()
    assert (difference.abs() > 0).all()


@pytest.mark.parametrize('codec, step', [
    (HalfCodec('feature', (6, 3, 2)), 2 ** -11), (ByteCodec('feature', (6, 3, 2)), 1.02 * 0.5 / 127),
    (HalfCodec('pre_logits', (36,)), 2 ** -11)])
def test_values_come_back_within_the_step(codec: HalfCodec, step: float) -> None:
    values = torch.randn(5, *codec.shape) * torch.logspace(-3, 3, 5).view(-1, *[1] * len(codec.shape))
    rows = codec.encode(values)
    assert rows.shape == (5, codec.row_bytes)
    assert codec.decode(rows).shape == values.shape
    differences = (codec.decode(rows) - values).flatten(1).abs().amax(1)
    assert (differences <= step * values.flatten(1).abs().amax(1)).all()
    assert 0 < codec.error(rows, values) < 3 * step


def test_eight_bits_of_a_vector_keep_channels_of_any_size() -> None:
    size = torch.logspace(-2, 2, 40)
    values = torch.randn(64, 40) * size
    codec = ByteCodec('pre_logits', (40,), spread_of(values))
    error = (codec.decode(codec.encode(values)) - values).abs().amax(0) / values.abs().amax(0)
    assert error[size > 0.5].max() < 0.01
    assert ByteCodec('pre_logits', (40,)).row_bytes == 42
    plain = ByteCodec('pre_logits', (40,))
    assert ((plain.decode(plain.encode(values)) - values).abs().amax(0) / values.abs().amax(0)).max() > 0.5


@pytest.mark.parametrize('codec', [
    HalfCodec('logits', (40,)), ByteCodec('logits', (40,)), TopKCodec(40, 5), ByteCodec('logits', (10, 2, 2))])
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_rows_that_are_not_finite_come_back_so(codec: HalfCodec, value: float) -> None:
    values = torch.randn(3, 40)
    values[1, 7] = value
    decoded = codec.decode(codec.encode(values.view(3, *getattr(codec, 'shape', (40,))))).flatten(1)
    assert decoded.isfinite().all(1).tolist() == [True, False, True]


def test_small_label_sets_are_stored_whole_and_others_as_asked() -> None:
    assert isinstance(logits_codec(10, 10, 4.), HalfCodec)
    assert isinstance(logits_codec(1000, 0, None), HalfCodec)
    assert isinstance(logits_codec(1000, 900, 1.), HalfCodec)
    assert isinstance(logits_codec(100, 10, 4.), TopKCodec)
    for temperature in (None, 0.5):
        with pytest.raises(UsageError, match='--cache-topk 0'):
            logits_codec(1000, 10, temperature)
    assert feature_codec('feature', (2, 3, 3), 'int8').row_bytes == 2 * 2 + 18


def test_ten_views_of_imagenet_1k_take_less_than_1200_megabytes() -> None:
    codec = logits_codec(1000, 10, 4.)
    assert table_bytes(1_281_167 * 10, codec.row_bytes) == 1_281_167 * 10 * (50 + 12 + 8) < 1.2e9
