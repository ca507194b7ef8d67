"""Forms in which a teacher's outputs are stored: rows of bytes of one length for each view.

Top-k logits keep the k largest in float16 and of the others what a softmax sees of them, their mean
e(T) = T log mean exp(z / T), which at that temperature T gives them their mass. Decoded, the others all are e(T). So
the softmax of the kept classes is exact up to float16. With r the others' mass, m their number and D the largest
difference between the student's log-probabilities of two of them, a KL divergence from the teacher is wrong by at most
r (log m + D), and its gradient with respect to the student's logits by at most 2 r in the sum of absolute values.
"""
import math
from typing import List, Optional, Sequence, Tuple

import numpy as np
import torch

from ..errors import UsageError
from ..losses import pool_to_grid

Pool = Tuple[Tuple[int, int], str]  # grid and mode, as of `losses.pool_to_grid`
TEMPERATURES = (1., 2., 4., 8., math.inf)  # at which the mass of the classes that are not kept is stored
_SMALL = 32  # classes of a label set of which all logits are kept
_FEW = 2  # positions of a map that take no more bytes in float16 than in 8 bits with a scale


class Codec:
    """A form of one output.

    Attributes:
        name: What it is called in files, unlike any other's.
        row_bytes: Length of the row of a view.
        pool: What a map is pooled by before it is encoded, None for nothing.
    """
    name: str
    row_bytes: int
    pool: Optional[Pool] = None

    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Return what is encoded of the teacher's values for a batch, [B, ...]."""
        return values if self.pool is None else pool_to_grid(values.float(), *self.pool)

    def encode(self, values: torch.Tensor) -> np.ndarray:
        """Return the rows of a batch, uint8 [B, row_bytes]."""
        raise NotImplementedError

    def decode(self, rows: np.ndarray) -> torch.Tensor:
        """Return the values of rows in float32, [B, ...]; nan and infinite ones come back as such."""
        raise NotImplementedError

    def error(self, rows: np.ndarray, values: torch.Tensor) -> float:
        """Return how far rows are from values, float32 [B, ...]: the root mean square of the difference over that of
        the values, of the view where it is largest."""
        return _relative_error(self.decode(rows).flatten(1), values.flatten(1))


class HalfCodec(Codec):
    """All values in float16.

    Args:
        output: Name of the output.
        shape: Of its values for one view, as they are stored.
        pool: What a map was pooled by.
    """

    def __init__(self, output: str, shape: Sequence[int], pool: Optional[Pool] = None):
        self.name = f'{output}-{_pool_text(pool)}float16-{_text(shape)}'
        self.shape = tuple(shape)
        self.row_bytes = 2 * math.prod(shape)
        self.pool = pool

    def encode(self, values: torch.Tensor) -> np.ndarray:
        return _bytes(values.detach().to(torch.float16))

    def decode(self, rows: np.ndarray) -> torch.Tensor:
        return _tensor(rows, torch.float16).view(len(rows), *self.shape).float()


class ByteCodec(Codec):
    """Values in 8 bits with a scale per channel of a map, [C, H, W], or per vector, [D].

    Channels of a vector that differ in size are brought to one first, by `spread`.

    Args:
        output: Name of the output.
        shape: Of its values for one view, as they are stored.
        spread: Typical size of each channel of a vector, [D]; all alike if None.
        pool: What a map was pooled by.
    """

    def __init__(
            self,
            output: str,
            shape: Sequence[int],
            spread: Optional[torch.Tensor] = None,
            pool: Optional[Pool] = None,
    ):
        self.name = f'{output}-{_pool_text(pool)}int8-{_text(shape)}'
        self.pool = pool
        self.shape = tuple(shape)
        self.num_scales = shape[0] if len(shape) > 1 else 1
        self.row_bytes = 2 * self.num_scales + math.prod(shape)
        self.spread = spread

    def encode(self, values: torch.Tensor) -> np.ndarray:
        values = values.detach().float()
        if self.spread is not None:
            values = values / self.spread.to(values.device)
        values = values.reshape(len(values), self.num_scales, -1)
        # rounded up: what is divided by it stays within 127
        scale = (1.01 / 127 * values.abs().amax(2).clamp(min=1e-30)).to(torch.bfloat16)
        rounded = (values / scale.float()[:, :, None]).round_().to(torch.int8)  # where that is not finite, scale is not
        return np.concatenate([_bytes(scale), _bytes(rounded)], axis=1)

    def decode(self, rows: np.ndarray) -> torch.Tensor:
        scale = _tensor(rows[:, :2 * self.num_scales], torch.bfloat16).float()
        numbers = _tensor(rows[:, 2 * self.num_scales:], torch.int8).view(len(rows), self.num_scales, -1)
        values = (numbers.float() * scale[:, :, None]).view(len(rows), *self.shape)
        return values if self.spread is None else values * self.spread


class TopKCodec(Codec):
    """The k largest logits in float16, and what a softmax sees of the others at five temperatures.

    Args:
        num_classes: K.
        k: How many are kept, below K.
        temperature: At which the others' mass is read back; between those stored it is interpolated.
    """

    def __init__(self, num_classes: int, k: int, temperature: float = 1.):
        if not 1 <= temperature:
            raise UsageError(
                f'--cache-topk {k} knows the mass of the other classes at temperatures from 1 up, a method of --kd '
                f'reads it at {temperature:g}: fill a cache with all logits (--cache-topk 0)')
        self.name = f'logits-top{k}-{num_classes}'
        self.num_classes = num_classes
        self.k = k
        self.temperature = temperature
        self.index_bytes = 1 if num_classes <= 256 else 2 if num_classes <= 65536 else 4
        self.row_bytes = k * (self.index_bytes + 2) + 2 * len(TEMPERATURES)

    def encode(self, values: torch.Tensor) -> np.ndarray:
        logits = values.detach().float()
        kept, indices = logits.topk(self.k, dim=1)
        kept[~logits.isfinite().all(1)] = math.nan
        means = _softmax_means(logits.scatter(1, indices, -math.inf), self.num_classes - self.k)
        numbers = indices.cpu().numpy().astype(f'<u{self.index_bytes}')
        return np.concatenate([
            np.ascontiguousarray(numbers).view(np.uint8).reshape(len(numbers), -1),
            _bytes(kept.to(torch.float16)), _bytes(means.to(torch.float16))], axis=1)

    def decode(self, rows: np.ndarray) -> torch.Tensor:
        first, second = self.k * self.index_bytes, self.k * (self.index_bytes + 2)
        indices = self._indices(rows)
        kept = _tensor(rows[:, first:second], torch.float16).float()
        others = self._at_temperature(_tensor(rows[:, second:], torch.float16).float())
        return others[:, None].repeat(1, self.num_classes).scatter_(1, indices, kept)

    def error(self, rows: np.ndarray, values: torch.Tensor) -> float:
        """As of all codecs, over the classes that are kept."""
        kept = self._indices(rows)
        return _relative_error(self.decode(rows).gather(1, kept), values.gather(1, kept))

    def _indices(self, rows: np.ndarray) -> torch.Tensor:
        """Return the classes that rows keep, int64 [B, k]."""
        numbers = np.ascontiguousarray(rows[:, :self.k * self.index_bytes]).view(f'<u{self.index_bytes}')
        return torch.from_numpy(numbers.astype(np.int64))

    def _at_temperature(self, means: torch.Tensor) -> torch.Tensor:
        """Interpolate the others' mean, [B, 5], linearly in 1 / T."""
        places = [1 / t for t in TEMPERATURES]
        wanted = 1 / self.temperature
        i = max(i for i, place in enumerate(places) if place >= wanted)
        if places[i] == wanted:
            return means[:, i]
        part = (places[i] - wanted) / (places[i] - places[i + 1])
        return (1 - part) * means[:, i] + part * means[:, i + 1]


def _softmax_means(others: torch.Tensor, count: int) -> torch.Tensor:
    """Return T log mean exp(z / T) of the entries above minus infinity at each T of TEMPERATURES, [B, 5]; the last is
    their mean.

    One exponential serves all: at half the temperature it is squared.
    """
    largest = others.amax(1, keepdim=True)
    finite = TEMPERATURES[:-1]
    powers = ((others - largest) / finite[-1]).exp_()
    means: List[torch.Tensor] = []
    for temperature in reversed(finite):
        means.insert(0, largest[:, 0] + temperature * (powers.sum(1).log() - math.log(count)))
        powers = powers.square_()
    return torch.stack([*means, others.masked_fill_(others == -math.inf, 0).sum(1) / count], 1)


def logits_codec(num_classes: int, topk: int, temperature: Optional[float]) -> Codec:
    """Return the form of logits: the `topk` largest, or all where that is 0, the label set small, or no more bytes.

    Args:
        num_classes: K.
        topk: `--cache-topk`.
        temperature: At which the methods read a softmax; None where one of them reads the values themselves.

    Raises:
        UsageError: If a method reads values that top-k logits do not have.
    """
    whole = HalfCodec('logits', (num_classes,))
    if not topk or num_classes <= max(_SMALL, topk):
        return whole
    if temperature is None:
        raise UsageError(
            f'--cache-topk {topk} keeps what a softmax at one temperature sees, and --kd reads other values of the '
            'logits, or several temperatures: store all with --cache-topk 0')
    codec = TopKCodec(num_classes, topk, temperature)
    return codec if codec.row_bytes < whole.row_bytes else whole


def feature_codec(output: str, shape: Sequence[int], precision: str, pool: Optional[Pool] = None) -> Codec:
    """Return the form of a feature.

    Args:
        output: Name of the output.
        shape: Of its values for one view, as they are stored.
        precision: `--cache-precision`.
        pool: What a map is pooled by first.
    """
    if precision == 'float16' or len(shape) == 3 and math.prod(shape[1:]) <= _FEW:
        return HalfCodec(output, shape, pool)
    return ByteCodec(output, shape, pool=pool)


def _pool_text(pool: Optional[Pool]) -> str:
    return '' if pool is None else f'{pool[1]}{_text(pool[0])}-'


def _relative_error(decoded: torch.Tensor, values: torch.Tensor) -> float:
    """Return the largest of the rows' root mean squared differences over those of their values; [B, N] each."""
    sizes = values.square().mean(1).sqrt().clamp(min=1e-30)
    return float(((decoded - values).square().mean(1).sqrt() / sizes).max())


def _text(shape: Sequence[int]) -> str:
    return 'x'.join(map(str, shape))


def _bytes(values: torch.Tensor) -> np.ndarray:
    values = values.cpu().contiguous()
    return values.view(len(values), -1).view(torch.uint8).numpy() if len(values) else np.zeros((0, 0), np.uint8)


def _tensor(rows: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Return rows of bytes as numbers; they share memory where that is possible."""
    aligned = rows.strides[0] % dtype.itemsize == 0 and rows.ctypes.data % dtype.itemsize == 0
    if not (aligned and rows.strides[1] == 1 and rows.flags.writeable):
        rows = np.array(rows, order='C')
    return torch.from_numpy(rows).view(dtype)


def spread_of(values: torch.Tensor) -> torch.Tensor:
    """Return the size of each channel of a batch of vectors, [B, D] -> [D], none below a tenth of the median."""
    sizes = values.detach().float().abs().amax(0).cpu()
    floor = 0.1 * float(sizes.median()) or float(sizes.max()) or 1.
    return torch.where(sizes.isfinite(), sizes, torch.ones_like(sizes)).clamp(min=floor)

