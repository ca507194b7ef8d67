"""Standardised targets: a teacher's features brought to mean 0 and deviation 1 by statistics of the training images.

'channel' standardises every channel by itself, as UNIC (Sariyildiz et al., ECCV 2024, https://arxiv.org/abs/2408.05088)
and DUNE do. 'phi-s' is PHI-S (Ranzinger et al., 2024, https://arxiv.org/abs/2410.01680): the feature is rotated so that
all channels have the same variance, and divided by one scale, so that distances keep their proportions.

The statistics are measured once, before the first update, and stay: an image has the same target in every epoch, on
every process, whatever batch it is in. (UNIC and DUNE average those of batches while they train, which begin far off.)
"""
import logging
from typing import AbstractSet, Any, Dict, FrozenSet, List, Mapping, Optional, Sequence, Set, Tuple

import torch
import torch.distributed as dist

from ..errors import UsageError
from ..features.spec import TARGETS, Features
from ..methods import DistillMethod
from ..methods._scopes import units_of
from ..utils.precision import full_float32, to_full_precision
from .hadamard import equalize, hadamard_matrix

_logger = logging.getLogger(__name__)

MODES = ('none', 'channel', 'phi-s')
NUM_IMAGES = 4096  # statistics of so many are within 2 % of those of all
_FLOOR = 1e-2  # least deviation of a channel, in parts of all channels' (root mean square): dead ones are not blown up
_CHUNK = 16  # images whose positions are summed at a time

Statistics = Tuple[torch.Tensor, torch.Tensor]  # mean [C], and deviations [C] or a matrix [C, C]


class Standardizer:
    """Standardisation of one teacher's features.

    Args:
        mode: 'none', 'channel' or 'phi-s'; None leaves it to the methods, which get 'channel' where they ask for it.

    Attributes:
        is_chosen: Whether it holds for every method that it can hold for, not only for those that ask for it.
        statistics: By output: 'feature', 'pre_logits', 'stage0', ..., 'block0', ...; float64 on the CPU.

    Raises:
        UsageError: If the mode is another one.
    """

    def __init__(self, mode: Optional[str] = None):
        if mode is not None and mode not in MODES:
            raise UsageError(f"--teacher-standardize '{mode}' must be one of {', '.join(MODES)}.")
        self.mode = mode or 'channel'
        self.is_chosen = mode is not None
        self.statistics: Dict[str, Statistics] = {}
        self._moments: Dict[str, _Moments] = {}
        self._placed: Dict[Tuple[str, torch.device, torch.dtype], Statistics] = {}

    @property
    def measured(self) -> FrozenSet[str]:
        """The outputs that there are statistics of."""
        return frozenset(_PLURALS.get(name.rstrip('0123456789'), name) for name in self.statistics)

    @torch.no_grad()
    def add(self, features: Features, outputs: AbstractSet[str], count: Optional[int] = None) -> None:
        """Add a batch of training images to those that the statistics are measured on.

        Args:
            features: Of the batch.
            outputs: Any of 'feature', 'pre_logits', 'stages', 'blocks'; each position of a map is a sample of its own.
            count: How many images from its start on count; all by default.
        """
        for name, x in _named(features, outputs).items():
            self._moments.setdefault(name, _Moments(x, full=self.mode == 'phi-s')).add(x[:count])

    def finish(self, distributed: bool = False) -> None:
        """Measure the statistics of what was added.

        Args:
            distributed: Put what all processes have added together; all then have the same statistics to the bit.

        Raises:
            UsageError: If values are not finite, or there is no variance.
        """
        moments, self._moments = self._moments, {}
        for name in sorted(moments):
            if distributed:
                moments[name].reduce()
            self.statistics[name] = _share(self._describe(name, moments[name]), distributed)
        self._placed.clear()

    def _describe(self, name: str, moments: '_Moments') -> Statistics:
        words = _words(name)
        if not moments.is_finite():
            raise UsageError(
                f"The teacher's {words} has values on the training images that are not finite, so that there is "
                'nothing to standardise by: give --teacher-dtype float32 or other weights.')
        mean, covariance = moments.describe()
        variance = covariance if covariance.ndim == 1 else covariance.diagonal()
        # a sum of equal numbers is off by rounding, which is no variance
        if not (variance > 1e-12 * mean.square()).any():
            raise UsageError(
                f"The teacher's {words} is the same for all of {moments.count} values of the training images: there is "
                'nothing to learn from it. Look at its weights and its input, or give more images.')
        return mean, channel_deviations(variance) if covariance.ndim == 1 else phi_s_matrix(covariance)

    def __call__(self, features: Features, outputs: AbstractSet[str]) -> Optional[Features]:
        """Return standardised features, None before their statistics have been measured."""
        named = _named(features, outputs)
        if not named.keys() <= self.statistics.keys():
            return None
        return _unnamed({name: self._standardize(name, x) for name, x in named.items()})

    @torch.no_grad()
    def _standardize(self, name: str, x: torch.Tensor) -> torch.Tensor:
        precise = to_full_precision(x)
        key = name, x.device, precise.dtype
        if key not in self._placed:  # converted first: not every device has float64
            mean, scale = self.statistics[name]
            self._placed[key] = mean.to(precise.dtype).to(x.device), scale.to(precise.dtype).to(x.device)
        mean, scale = self._placed[key]
        if len(mean) != x.shape[1]:
            raise UsageError(f"The teacher's {_words(name)} has {x.shape[1]} channels, its statistics {len(mean)}.")
        with full_float32(), torch.autocast(x.device.type, enabled=False):
            standardize = standardize_channels if scale.ndim == 1 else rotate_channels
            return standardize(precise, mean, scale).to(x.dtype)

    def state(self, kd: Sequence[str]) -> Dict[str, Any]:
        """Return what a checkpoint keeps: the mode, the names of the methods that it holds for, the statistics."""
        names = ('mean', 'matrix' if self.mode == 'phi-s' else 'deviation')
        tensors = {
            f'{output}.{name}': tensor for output, pair in self.statistics.items() for name, tensor in zip(names, pair)}
        return {'mode': self.mode, 'kd': list(kd), **tensors}

    def load(self, state: Optional[Mapping[str, Any]], kd: Sequence[str]) -> None:
        """Take the statistics that `state` returned.

        Args:
            state: Of a checkpoint; None of one whose targets were not standardised.
            kd: Names of the methods that get standardised features here.

        Raises:
            UsageError: If the checkpoint's targets were others.
        """
        saved = (state['mode'], list(state['kd'])) if state else ('none', [])
        now = (self.mode, list(kd)) if kd else ('none', [])
        if saved != now or state is None:
            was, here = (f'{mode} for {"+".join(names)}' if names else mode for mode, names in (saved, now))
            raise UsageError(
                f'The checkpoint was written with other targets: standardised {was}, here {here}. Resume with its '
                '--teacher-standardize.')
        pairs: Dict[str, List[torch.Tensor]] = {}
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                pairs.setdefault(name.partition('.')[0], []).append(value.cpu())
        self.statistics = {output: (pair[0], pair[1]) for output, pair in pairs.items()}
        self._placed.clear()


def choose_standardized(
        methods: Mapping[str, DistillMethod],
        standardizers: Mapping[str, Standardizer],
        verbose: bool = False,
) -> FrozenSet[str]:
    """Return what gets standardised features: names of methods, METHOD@TEACHER with one of several teachers.

    Args:
        methods: Methods by name.
        standardizers: Of the teachers by name, of one without others under ''.
        verbose: Log it.

    Raises:
        UsageError: If standardised features are asked for and no method can take them.
    """
    chosen: Set[str] = set()
    for name, standardizer in standardizers.items():
        units = {unit: methods[method] for unit, method in units_of(methods, name).items()}
        standardized = _choose(units, standardizer)
        if standardized and verbose:
            _report(units, standardized, standardizer.mode)
        chosen |= standardized
    asked = [one.mode for one in standardizers.values() if one.is_chosen and one.mode != 'none']
    if asked and methods and not chosen:
        raise UsageError(
            f'--teacher-standardize {asked[0]} has nothing to standardise: --kd {"+".join(methods)} reads '
            "logits, or features that go with the teacher's own layers or class means and stay as they are. Leave it "
            'out, or add a method of features (norm, tokens, ...: --list-kd).')
    return frozenset(chosen)


def _choose(methods: Mapping[str, DistillMethod], standardizer: Standardizer) -> Set[str]:
    possible = {name for name, method in methods.items() if method.takes_standardized}
    if not standardizer.is_chosen:
        return {name for name in possible if methods[name].standardized_targets}
    return set() if standardizer.mode == 'none' else possible


def _report(methods: Mapping[str, DistillMethod], standardized: AbstractSet[str], mode: str) -> None:
    raw = [
        name for name, method in methods.items()
        if name not in standardized and method.teacher_outputs & {*TARGETS, 'tap'}]
    rest = f'; as they come for {", ".join(raw)}' if raw else ''
    _logger.info(f'Targets standardised (--teacher-standardize {mode}) for {", ".join(sorted(standardized))}{rest}.')


class _Moments:
    """Sums of the values of an output, and of their squares or products."""

    def __init__(self, x: torch.Tensor, full: bool):
        self.device = torch.device('cpu') if x.device.type == 'mps' else x.device  # which has no float64
        channels = x.shape[1]
        self.count = 0
        self.total = torch.zeros(channels, dtype=torch.float64, device=self.device)
        self.products = torch.zeros((channels, channels) if full else channels, dtype=torch.float64, device=self.device)

    def add(self, x: torch.Tensor) -> None:
        """Add the values of a batch, [B, C] or [B, C, H, W]."""
        for part in x.split(_CHUNK) if len(x) else ():
            rows = part.to(self.device).double().movedim(1, -1).flatten(0, -2)  # [P, C]
            self.count += len(rows)
            self.total += rows.sum(0)
            self.products += rows.T @ rows if self.products.ndim == 2 else rows.square().sum(0)

    def reduce(self) -> None:
        """Add up what the processes have."""
        count = torch.tensor(float(self.count), dtype=torch.float64, device=self.device)
        for tensor in (count, self.total, self.products):
            dist.all_reduce(tensor)
        self.count = int(count)

    def is_finite(self) -> bool:
        return bool(self.total.isfinite().all() and self.products.isfinite().all())

    def describe(self) -> Statistics:
        """Return the mean, [C], and the unbiased variances, [C], or covariances, [C, C]."""
        mean = self.total.cpu() / max(self.count, 1)
        squares = mean.square() if self.products.ndim == 1 else torch.outer(mean, mean)
        return mean, (self.products.cpu() - self.count * squares) / max(self.count - 1, 1)


def channel_deviations(variance: torch.Tensor, floor: float = _FLOOR) -> torch.Tensor:
    """Return the deviations to divide channels by, [C], none of them 0.

    Args:
        variance: Of every channel, [C].
        floor: Least deviation, in parts of the root mean square over channels.
    """
    variance = variance.clamp_min(0)
    return variance.sqrt().clamp_min(floor * variance.mean().sqrt())


def phi_s_matrix(covariance: torch.Tensor) -> torch.Tensor:
    """Return the matrix of PHI-S: a rotation after which all channels have the same variance, divided by its root.

    With the covariance U diag(e) U^T it is H U^T / sqrt(mean e) for a Hadamard matrix H. Where there is none of the
    size, H is a rotation that makes the variances equal (the official code's random one does so only roughly).

    Args:
        covariance: [C, C], float64.
    """
    values, vectors = _eigenvectors(covariance)
    values = values.clamp_min(0)  # rounding
    spread = hadamard_matrix(len(values))
    return (equalize(values) if spread is None else spread) @ vectors.T / values.mean().sqrt()


def _eigenvectors(covariance: torch.Tensor) -> Statistics:
    """Return eigenvalues and eigenvectors; of a matrix without negative ones they are its singular vectors too."""
    size = covariance.diagonal().mean()
    try:
        values, vectors = torch.linalg.eigh(covariance / size)
    except torch.linalg.LinAlgError:  # does not converge for some of low rank: more channels than values
        vectors, values, _ = torch.linalg.svd(covariance / size)
    return values * size, vectors


def standardize_channels(x: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """Return (x - mean) / deviation by channel; x is [B, C] or [B, C, H, W], the others [C]."""
    shape = (-1, *[1] * (x.ndim - 2))
    return (x - mean.view(shape)) / deviation.view(shape)


def rotate_channels(x: torch.Tensor, mean: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Return matrix (x - mean) of every position; x is [B, C] or [B, C, H, W], mean [C], matrix [C, C]."""
    return ((x.movedim(1, -1) - mean) @ matrix.T).movedim(-1, 1)


def _share(statistics: Statistics, distributed: bool) -> Statistics:
    """Give all processes the first one's: eigenvectors of other machines may have other signs."""
    if not distributed:
        return statistics
    values: List[Any] = [statistics]
    dist.broadcast_object_list(values, src=0)
    return values[0]


_PLURALS = {'stage': 'stages', 'block': 'blocks'}


def _named(features: Features, outputs: AbstractSet[str]) -> Dict[str, torch.Tensor]:
    """Return features by name, those of stages and blocks as 'stage0', 'block0', ..."""
    named = {name: getattr(features, name) for name in ('feature', 'pre_logits') if name in outputs}
    for name, plural in _PLURALS.items():
        if plural in outputs:
            named.update({f'{name}{i}': x for i, x in enumerate(getattr(features, plural))})
    return {name: x for name, x in named.items() if x is not None}


def _unnamed(named: Dict[str, torch.Tensor]) -> Features:
    stages, blocks = (
        tuple(x for name, x in named.items() if name.startswith(prefix)) for prefix in _PLURALS)
    return Features(feature=named.get('feature'), pre_logits=named.get('pre_logits'), stages=stages, blocks=blocks)


def _words(name: str) -> str:
    kind = name.rstrip('0123456789')
    known = {'feature': 'last-stage feature', 'pre_logits': 'pre-logits'}
    return known.get(name) or f'{kind} {int(name[len(kind):]) + 1}'

