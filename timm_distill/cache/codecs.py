"""Forms in which a teacher's outputs are stored: rows of bytes of one length for each view.

Top-k logits keep the k largest in float16 and of the others what a softmax sees of them, their mean
e(T) = T log mean exp(z / T), which at that temperature T gives them their mass. Decoded, the others all are e(T). So
the softmax of the kept classes is exact up to float16. With r the others' mass, m their number and D the largest
difference between the student's log-probabilities of two of them, a KL divergence from the teacher is wrong by at most
r (log m + D), and its gradient with respect to the student's logits by at most 2 r in the sum of absolute values.
"""
import math
from typing import Any, Dict, Optional, Sequence

import numpy as np
import torch

from ..errors import UsageError

TEMPERATURES = (1., 2., 4., 8., math.inf)  # at which the mass of the classes that are not kept is stored
_SMALL = 32  # classes of a label set of which all logits are kept


class Codec:
    """A form of one output.

    Attributes:
        name: What it is called in files, unlike any other's.
        row_bytes: Length of the row of a view.
        step: Largest difference between a value and what is read back of it, relative to the largest of its row.
    """
    name: str
    row_bytes: int
    step: float

    def encode(self, values: torch.Tensor) -> np.ndarray:
        """Return the rows of a batch, uint8 [B, row_bytes]."""
        raise NotImplementedError

    def decode(self, rows: np.ndarray) -> torch.Tensor:
        """Return the values of rows in float32, [B, ...]; nan and infinite ones come back as such."""
        raise NotImplementedError

    def error(self, rows: np.ndarray, values: torch.Tensor) -> torch.Tensor:
        """Return the largest difference of rows from the values they stand for, relative to the largest of its row."""
        decoded, values = self.decode(rows).flatten(1), values.flatten(1)
        return ((decoded - values).abs().amax(1) / values.abs().amax(1).clamp(min=1e-30)).max()


class HalfCodec(Codec):
    """All values in float16.

    Args:
        output: Name of the output.
        shape: Of its values for one view.
    """
    step = 2 ** -11

    def __init__(self, output: str, shape: Sequence[int]):
        self.name = f'{output}-float16-{_text(shape)}'
        self.shape = tuple(shape)
        self.row_bytes = 2 * math.prod(shape)

    def encode(self, values: torch.Tensor) -> np.ndarray:
        return _bytes(values.detach().to(torch.float16))

    def decode(self, rows: np.ndarray) -> torch.Tensor:
        return _tensor(rows, torch.float16).view(len(rows), *self.shape).float()


class ByteCodec(Codec):
    """Values in 8 bits with a scale per channel of a map, [C, H, W], or per vector, [D].

    Channels of a vector that differ in size are brought to one first, by `spread`.

    Args:
        output: Name of the output.
        shape: Of its values for one view.
        spread: Typical size of each channel of a vector, [D]; all alike if None.
    """
    step = 1.02 * 0.5 / 127

    def __init__(self, output: str, shape: Sequence[int], spread: Optional[torch.Tensor] = None):
        self.name = f'{output}-int8-{_text(shape)}'
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
        numbers = (values / scale.float()[:, :, None]).round()
        rounded = torch.where(numbers.isfinite(), numbers, torch.zeros_like(numbers)).to(torch.int8)
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
    step = 2 ** -11

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
        others = logits.scatter(1, indices, -math.inf)
        bad = ~logits.isfinite().all(1)
        means = torch.stack([_softmax_mean(others, self.num_classes - self.k, t) for t in TEMPERATURES], 1)
        kept[bad] = math.nan
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

    def error(self, rows: np.ndarray, values: torch.Tensor) -> torch.Tensor:
        """As of all codecs, over the classes that are kept."""
        differences = (self.decode(rows) - values).gather(1, self._indices(rows))
        return (differences.abs().amax(1) / values.abs().amax(1).clamp(min=1e-30)).max()

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


def _softmax_mean(others: torch.Tensor, count: int, temperature: float) -> torch.Tensor:
    """Return T log mean exp(z / T) of the entries above minus infinity, [B]; the plain mean at an infinite T."""
    if math.isinf(temperature):
        return others.masked_fill(others == -math.inf, 0).sum(1) / count
    return temperature * (torch.logsumexp(others / temperature, dim=1) - math.log(count))


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


def feature_codec(output: str, shape: Sequence[int], precision: str, spread: Optional[torch.Tensor] = None) -> Codec:
    """Return the form of a feature, by `--cache-precision`."""
    codecs: Dict[str, Any] = {'float16': HalfCodec, 'int8': ByteCodec}
    return codecs[precision](output, shape, *([spread] if precision == 'int8' else []))


def _text(shape: Sequence[int]) -> str:
    return 'x'.join(map(str, shape))


def _bytes(values: torch.Tensor) -> np.ndarray:
    values = values.cpu().contiguous()
    return values.view(len(values), -1).view(torch.uint8).numpy() if len(values) else np.zeros((0, 0), np.uint8)


def _tensor(rows: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.array(rows, dtype=np.uint8, order='C')).view(dtype)


def spread_of(values: torch.Tensor) -> torch.Tensor:
    """Return the size of each channel of a batch of vectors, [B, D] -> [D], none below a tenth of the median."""
    sizes = values.detach().float().abs().amax(0).cpu()
    floor = 0.1 * float(sizes.median()) or float(sizes.max()) or 1.
    return torch.where(sizes.isfinite(), sizes, torch.ones_like(sizes)).clamp(min=floor)

