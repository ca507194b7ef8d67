"""Preprocessing of a teacher's images: mean, standard deviation, size and interpolation, and where each was taken from.

What files and flags say of it comes as records, the one that counts most first.
"""
import logging
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, cast

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..errors import UsageError
from ..features.inputs import reason_not_to_run, resize_images, runnable_size

_logger = logging.getLogger(__name__)

RESIZE_MODES = ('bicubic', 'bilinear', 'nearest')  # of those that timm knows, what resizes tensors


@dataclass(frozen=True)
class InputRecord:
    """Record of one source on the images that a model was trained on; None where it says nothing.

    Attributes:
        source: Its name, for messages: 'the args in last.pth.tar'.
        mean: Normalisation per channel, or one value for all.
        std: Likewise.
        size: (height, width) that the model is to be fed.
        interpolation: Filter of resizing, under timm's name.
        assumed: Nobody said so of these weights: a default.
        trained_size: (height, width) of the images that the weights were trained on, where the model need not be fed
            that.
    """
    source: str
    mean: Optional[Sequence[float]] = None
    std: Optional[Sequence[float]] = None
    size: Optional[Tuple[int, int]] = None
    interpolation: Optional[str] = None
    assumed: bool = False
    trained_size: Optional[Tuple[int, int]] = None


DEFAULT_RECORD = InputRecord(
    "timm's default", IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, interpolation='bicubic', assumed=True)


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of the images that a teacher is fed. Equal where the numbers are, wherever these came from.

    Attributes:
        mean: Normalisation, one value per channel.
        std: Likewise.
        input_size: What the teacher is fed, (channels, height, width).
        interpolation: How images of another size are resized to it.
        sources: Where each of these was taken from, by attribute.
        assumed: Which of them nobody said of these weights.
    """
    mean: Tuple[float, ...]
    std: Tuple[float, ...]
    input_size: Tuple[int, int, int]
    interpolation: str
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    assumed: Tuple[str, ...] = field(default=(), compare=False)

    def values(self) -> Dict[str, Any]:
        """Return what the teacher's outputs depend on as plain values, for fingerprints."""
        return {name: value for name, value in asdict(self).items() if name not in ('sources', 'assumed')}

    def __str__(self) -> str:
        texts = {
            'input_size': 'x'.join(str(n) for n in self.input_size[1:]),
            'mean': f'mean {_format(self.mean)}',
            'std': f'std {_format(self.std)}',
            'interpolation': self.interpolation,
        }
        by_source: Dict[str, List[str]] = {}
        for name, text in texts.items():
            by_source.setdefault(self.sources.get(name, ''), []).append(text)
        return '; '.join(', '.join(items) + (f' ({source})' if source else '') for source, items in by_source.items())


def model_record(model: nn.Module) -> InputRecord:
    """Return what a model's `pretrained_cfg` says; its size is left out, as many models take any."""
    config = getattr(model, 'pretrained_cfg', None) or {}
    return InputRecord(
        'its pretrained_cfg', config.get('mean'), config.get('std'), interpolation=config.get('interpolation'))


def resolve_size(
        model: nn.Module,
        input_size: Sequence[int],
        records: Sequence[InputRecord],
) -> Tuple[Optional[Tuple[int, int]], str]:
    """Return the size that a teacher's images are resized to, None where it runs at the student's; and who says so.

    Raises:
        UsageError: If the model runs neither at the student's input size nor at its own, or not at that of a record.
    """
    name, student_size = type(model).__name__, (input_size[1], input_size[2])
    said = first_record([*records, InputRecord('')], 'size')
    if said.size is not None:
        size = (int(said.size[0]), int(said.size[1]))
        reason = reason_not_to_run(model, (input_size[0], *size))
        if reason:
            raise UsageError(
                f'The teacher {name} cannot run at {size[0]}x{size[1]} ({said.source}): {reason}. '
                'Change --teacher-img-size, --in-chans or --teacher-kwargs img_size=N.')
        return (None if size == student_size else size), said.source
    own_size, reason = runnable_size(model, input_size)
    if reason:
        raise UsageError(
            f'The teacher {name} cannot run on the input {list(input_size)}: '
            f'{reason}. Change --img-size, --in-chans or --teacher-img-size.')
    return own_size, "the student's size" if own_size is None else 'the size that it was built for'


def resolve_preprocessing(
        records: Sequence[InputRecord],
        input_size: Sequence[int],
        size_source: str,
) -> Preprocessing:
    """Return the preprocessing that records name, each value from the first of them that has it.

    Args:
        records: The one that counts most first; timm's defaults stand behind them.
        input_size: What the teacher is fed, (channels, height, width).
        size_source: Where that size comes from.

    Raises:
        UsageError: If a normalisation is none: not one finite number for all channels or for each, or divided by 0.
    """
    chosen = {name: first_record([*records, DEFAULT_RECORD], name) for name in ('mean', 'std', 'interpolation')}
    interpolation = str(chosen['interpolation'].interpolation)
    sources = {name: record.source for name, record in chosen.items()}
    if interpolation not in RESIZE_MODES:
        sources['interpolation'] += f': {interpolation}, which resizes no tensors'
    return Preprocessing(
        mean=_check_channels('mean', chosen['mean'], input_size[0]),
        std=_check_channels('std', chosen['std'], input_size[0]),
        input_size=cast(Tuple[int, int, int], tuple(input_size)),
        interpolation=interpolation if interpolation in RESIZE_MODES else 'bicubic',
        sources={**sources, 'input_size': size_source},
        assumed=tuple(name for name, record in chosen.items() if record.assumed),
    )


def first_record(records: Sequence[InputRecord], name: str) -> InputRecord:
    """Return the first record that has a value; the last of all where none has."""
    return next((record for record in records if getattr(record, name) is not None), records[-1])


def _check_channels(name: str, record: InputRecord, channels: int) -> Tuple[float, ...]:
    values = getattr(record, name)
    try:
        numbers = per_channel(values, channels)
    except (TypeError, ValueError):
        numbers = torch.empty(0)
    if not numbers.numel() or not numbers.isfinite().all() or name == 'std' and not (numbers > 0).all():
        raise UsageError(
            f'The teacher\'s {name} {str(values)[:80]!r} ({record.source}) must be numbers'
            f'{" above 0" if name == "std" else ""}, one or one for each of {channels} channels: give '
            f'--teacher-{name}.')
    return tuple(numbers.tolist())


def renormalization(
        preprocessing: Preprocessing,
        student_mean: Sequence[float],
        student_std: Sequence[float],
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return (scale, shift), [1, C, 1, 1]: the map from the student's normalised input to the teacher's."""
    channels = preprocessing.input_size[0]
    own_mean, own_std = per_channel(preprocessing.mean, channels), per_channel(preprocessing.std, channels)
    mean, std = per_channel(student_mean, channels), per_channel(student_std, channels)
    scale, shift = std / own_std, (mean - own_mean) / own_std
    return scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)


class Preparation(nn.Module):
    """Map from the student's normalised images, [B, C, H, W], to the teacher's.

    Args:
        preprocessing: Of the teacher.
        student_mean: Normalisation of the student's images, per channel.
        student_std: Likewise.
        resize_to: Size (height, width) of the teacher's images, None where it is the student's.
        like: A tensor on the teacher's device and in its precision.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(
            self,
            preprocessing: Preprocessing,
            student_mean: Sequence[float],
            student_std: Sequence[float],
            resize_to: Optional[Tuple[int, int]],
            like: torch.Tensor,
    ):
        super().__init__()
        scale, shift = renormalization(preprocessing, student_mean, student_std)
        self.renormalize = bool((scale != 1).any() or (shift != 0).any())
        self.dtype = like.dtype
        self.resize_to = resize_to
        self.interpolation = preprocessing.interpolation
        precise = torch.promote_types(like.dtype, torch.float32)  # images are rounded once, after this
        self.register_buffer('scale', scale.to(like.device, precise), persistent=False)
        self.register_buffer('shift', shift.to(like.device, precise), persistent=False)
        if bool(((scale - 1).abs() >= 1e-6).any() or (shift.abs() >= 1e-6).any()):
            _warn_of_assumptions(preprocessing, student_mean, student_std)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.renormalize:
            images = images * self.scale + self.shift
        images = images.to(self.dtype)
        return images if self.resize_to is None else resize_images(images, self.resize_to, self.interpolation)


def _warn_of_assumptions(own: Preprocessing, student_mean: Sequence[float], student_std: Sequence[float]) -> None:
    """Warn of a normalisation that is not the student's and that nobody said."""
    if set(own.assumed) & {'mean', 'std'}:
        student = ' and '.join(' '.join(f'{v:.4g}' for v in values) for values in (student_mean, student_std))
        _logger.warning(
            'Nothing says with which mean and standard deviation the teacher was trained, and a wrong one costs '
            f"its accuracy: its images get {own}; the student's {student}. Give --teacher-mean and --teacher-std.")


def per_channel(values: Sequence[float], channels: int) -> torch.Tensor:
    """Return one value per channel; where the counts differ, the average for all, as timm's loader does."""
    numbers = [float(value) for value in values]
    if len(numbers) != channels:
        numbers = [math.fsum(numbers) / len(numbers)] * channels if numbers else []
    return torch.tensor(numbers, dtype=torch.float64)


def is_same(one: Any, other: Any) -> bool:
    """Whether two means or standard deviations are the same, each given for all channels or for every one."""
    a, b = (list(values) if isinstance(values, (tuple, list)) else [values] for values in (one, other))
    return a * (len(b) if len(a) == 1 else 1) == b * (len(a) if len(b) == 1 else 1)


def _format(values: Sequence[float]) -> str:
    return ' '.join(f'{value:.4g}' for value in (values if len(set(values)) > 1 else values[:1]))
