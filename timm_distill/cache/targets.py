"""Cached targets of a run: what a teacher gives for replayed views, read where it is stored and stored where it is not.

What the methods see always is what was read back of the stored form, also where the teacher ran just now: a run that
fills a cache and one that reads it are the same run.
"""
import io
import logging
import os
import zlib
from functools import partial
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch

from ..checkpoint.file import why_unwritten
from ..data.views import ViewGrid
from ..errors import UsageError
from ..features.spec import Features
from .codecs import ByteCodec, Codec, spread_of
from .table import Table

_logger = logging.getLogger(__name__)

# Other batches, kernels and devices round otherwise. Two roundings of the same are 1.4 times as far from each other as
# one from the truth; docs/cache.md has what was measured, and what a wrong cache differs by.
_ROUNDINGS = 2.5
_KERNELS = 2e-3  # relative difference that is never more than rounding


LiveTeacher = Callable[[torch.Tensor], Features]
RoundedTeacher = Callable[[torch.Tensor], Tuple[Features, float]]


class CacheMismatchError(RuntimeError):
    """A live teacher gives something else than its cache."""


class CachedTargets:
    """Outputs of a teacher for the views of a training set.

    Args:
        folder: Of the cache, whose header was checked.
        grid: All views.
        codecs: Form of every output that the methods read, by the names of `flatten_features`.
        writable: Whether what is missing is stored.
        num_classes: K of the logits.
        known: The classes that the teacher knows, whose logits are stored, [M]; None for all.
    """

    def __init__(
            self,
            folder: str,
            grid: ViewGrid,
            codecs: Mapping[str, Codec],
            writable: bool = True,
            num_classes: int = 0,
            known: Optional[torch.Tensor] = None,
    ):
        self.folder = folder
        self.grid = grid
        self.codecs = dict(codecs)
        self.writable = writable
        self.num_classes = num_classes
        self.known = None if known is None else known.cpu()
        self.num_checks = 0  # views of this epoch that a live teacher has to confirm
        self._bounds: Dict[str, float] = {}  # of their difference by output, once measured
        self._warned: set = set()
        self.tables = {
            name: Table(os.path.join(folder, codec.name), codec.row_bytes, len(grid), writable)
            for name, codec in self.codecs.items()}
        for name in self.codecs:
            self._load_spread(name)

    def read(
            self,
            keys: torch.Tensor,
            images: torch.Tensor,
            teacher: Optional[LiveTeacher],
            rounded: Optional[RoundedTeacher] = None,
    ) -> Features:
        """Return the outputs for a batch, float32 where the images are.

        Args:
            keys: Of the views, int64 [B].
            images: The views, normalised for the student.
            teacher: Runs on images; None where there is none.
            rounded: Runs on images in another precision; returns with its outputs how much of their difference is
                rounding. Only for checks.

        Raises:
            UsageError: If views are missing and there is no teacher.
            CacheMismatchError: If `num_checks` asks for it and the teacher gives something else.
        """
        slots = self.grid.batch_keys(keys).tolist()
        rows, found = self._read_rows(slots)
        if not found.all():
            if teacher is None:
                raise UsageError(
                    f'--teacher-cache {self.folder} holds nothing for {int((~found).sum())} of {len(found)} views of a '
                    'batch: give --teacher to fill what is missing, or python -m timm_distill.cache fill')
            values = self._complete(slots, rows, found, self._flatten(teacher(images)))
        else:
            values = {name: codec.decode(rows[name]) for name, codec in self.codecs.items()}
            self._check(rows, images, teacher, rounded)
        features = unflatten_features({
            name: value.to(images.device, images.dtype) for name, value in values.items()})
        if self.known is not None and features.logits is not None:
            features.classes = self.known.to(images.device)
            whole = features.logits.new_full((len(slots), self.num_classes), -torch.inf)
            features.logits = whole.index_copy_(1, features.classes, features.logits)
        return features

    def describe(self) -> Dict[str, Any]:
        """Return in words what a run reads, to be compared when it is resumed."""
        stored = ', '.join(codec.name for codec in self.codecs.values())
        return {'views of an image': self.grid.num_views, 'stored': stored}

    def missing(self, number: int, size: int = 0) -> np.ndarray:
        """Return the keys of the views of a number and a size, of the first split, that some output lacks."""
        stride = self.grid.num_sizes * self.grid.num_splits
        place, period = number * stride + size * self.grid.num_splits, self.grid.num_views * stride
        lacking = [
            slots[slots % period == place] for table in self.tables.values() for slots in table.iter_missing()]
        return np.unique(np.concatenate([np.zeros(0, np.int64), *lacking]))

    def count_missing(self, num_numbers: int) -> int:
        """Return how many views with a number below one some output lacks, of all sizes and splits."""
        stride = self.grid.num_sizes * self.grid.num_splits
        counts = []
        for table in self.tables.values():
            counts.append(sum(
                int((slots // stride % self.grid.num_views < num_numbers).sum()) for slots in table.iter_missing()))
        return max(counts, default=0)

    def flush(self) -> None:
        """Make what was stored survive a power failure; a full disk ends the filling."""
        for table in self.tables.values():
            if self.writable:
                self._guarded(table.flush)

    def close(self) -> None:
        """Flush and close all files."""
        for table in self.tables.values():
            self._guarded(table.close)

    def _flatten(self, features: Features) -> Dict[str, torch.Tensor]:
        """Return what is stored of a teacher's features, by name."""
        live = flatten_features(features)
        if self.known is not None and 'logits' in live:
            live['logits'] = live['logits'][:, self.known.to(live['logits'].device)]
        return {name: codec.reduce(live[name]) for name, codec in self.codecs.items()}

    def _read_rows(self, slots: Sequence[int]) -> Any:
        rows: Dict[str, np.ndarray] = {}
        found = np.ones(len(slots), bool)
        for name, table in self.tables.items():
            rows[name], there = table.read(slots)
            found &= there
        return rows, found

    def _complete(
            self,
            slots: List[int],
            rows: Dict[str, np.ndarray],
            found: np.ndarray,
            live: Mapping[str, torch.Tensor],
    ) -> Dict[str, torch.Tensor]:
        """Put what the teacher gave where nothing is stored, and store it."""
        encoded, decoded = {}, {}
        fits = torch.ones(len(slots), dtype=torch.bool)
        for name, codec in self.codecs.items():
            if isinstance(codec, ByteCodec) and codec.spread is None and codec.num_scales == 1:
                self._save_spread(name, live[name])
            encoded[name] = np.where(found[:, None], rows[name], codec.encode(live[name]))
            decoded[name] = codec.decode(encoded[name])
            fits &= decoded[name].flatten(1).isfinite().all(1)
        for name in decoded if not fits.all() else ():  # never stored: too large for its form, or not finite at all
            decoded[name][~fits] = live[name].detach().cpu().float()[~fits]
            self._warn('values', f'{int((~fits).sum())} views have teacher outputs that the cache cannot hold (nan, or '
                                 'too large for float16): they are not stored.')
        new = ~found & fits.numpy()
        if self.writable and new.any():
            chosen = [slot for slot, is_new in zip(slots, new) if is_new]
            for name, table in self.tables.items():
                self._guarded(partial(table.write, chosen, encoded[name][new]))
        return decoded

    def _check(
            self,
            rows: Mapping[str, np.ndarray],
            images: torch.Tensor,
            teacher: Optional[LiveTeacher],
            rounded: Optional[RoundedTeacher],
    ) -> None:
        """Compare the first views of a batch with what the teacher says of them now."""
        if not self.num_checks or teacher is None:
            return
        count = min(self.num_checks, len(images) // self.grid.num_splits)
        self.num_checks -= count
        live = self._flatten(teacher(images[:count]))
        if not self._bounds:
            self._bounds = self._measure_bounds(live, images[:count], rounded)
        for name, codec in self.codecs.items():
            values = live[name].detach().cpu().float()
            error = codec.error(rows[name][:count], values)
            if not error <= self._bounds[name]:  # true for nan
                raise CacheMismatchError(
                    f'The teacher gives other {name.replace("_", "-")} than --teacher-cache {self.folder} holds of '
                    f'the same views: they differ by {error:.2g} of their size (root mean square), rounding explains '
                    f'{self._bounds[name]:.2g}. The cache is of something else: fill another.')

    def _measure_bounds(
            self,
            live: Dict[str, torch.Tensor],
            images: torch.Tensor,
            rounded: Optional[RoundedTeacher],
    ) -> Dict[str, float]:
        """Return by how much each output may differ: what storing it loses, and what rounding does to this teacher."""
        others, share = live, 0.
        if rounded is not None:
            features, share = rounded(images)
            others = self._flatten(features)
        bounds = {}
        for name, codec in self.codecs.items():
            values, other = (outputs[name].detach().cpu().float() for outputs in (live, others))
            rows = codec.encode(values)
            bounds[name] = _KERNELS + 2 * codec.error(rows, values) + _ROUNDINGS * share * codec.error(rows, other)
        _logger.info('Checks of cached targets allow differences of ' + ', '.join(
            f'{bound:.2g} in {name.replace("_", "-")}' for name, bound in bounds.items()) + '.')
        return bounds

    def _guarded(self, action: Callable[[], None]) -> None:
        """Do what writes; an error of the file system ends the filling, not the run."""
        try:
            action()
        except OSError as e:
            self.writable = False
            self._warn(
                'disk', f'--teacher-cache {self.folder} cannot be written ({why_unwritten(e)}): nothing more is '
                'stored, the run goes on with its teacher. What is stored stays.')

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            _logger.warning(text)

    def _spread_file(self, name: str) -> str:
        return os.path.join(self.folder, self.codecs[name].name, 'spread.npy')

    def _load_spread(self, name: str) -> None:
        """Read the size of the channels, without which rows of 8 bits are other values.

        Raises:
            UsageError: If it is damaged, or missing although there are rows.
        """
        codec, path = self.codecs[name], self._spread_file(name)
        if not isinstance(codec, ByteCodec) or codec.num_scales > 1:
            return
        has_rows, data, problem = bool(self.tables[name].shards()), b'', ''  # in this order: rows come last
        if os.path.exists(path):
            with open(path, 'rb') as file:
                data = file.read()
            whole = data and zlib.crc32(data[:-4]) == int.from_bytes(data[-4:], 'little')
            problem = '' if whole else 'damaged'
        elif has_rows:
            problem = 'missing'
        if problem:
            raise UsageError(
                f'{path} of --teacher-cache, in terms of which its rows are, is {problem}: remove the folder '
                f'{os.path.dirname(path)}, which a run with --teacher fills again')
        if data:
            codec.spread = torch.from_numpy(np.load(io.BytesIO(data)))

    def _save_spread(self, name: str, values: torch.Tensor) -> None:
        """Fix the size of the channels by the first batch of the first process that gets there."""
        codec, path = self.codecs[name], self._spread_file(name)
        assert isinstance(codec, ByteCodec)
        codec.spread = spread = spread_of(values)
        if not self.writable:
            return
        own = f'{path[:-4]}-{os.getpid()}.npy'

        def write() -> None:
            content = io.BytesIO()
            np.save(content, spread.numpy())
            with open(own, 'wb') as file:
                file.write(content.getvalue() + zlib.crc32(content.getvalue()).to_bytes(4, 'little'))
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(own, path)
            except FileExistsError:
                pass
            os.remove(own)
        self._guarded(write)
        self._load_spread(name)


def flatten_features(features: Features) -> Dict[str, torch.Tensor]:
    """Return what a teacher gave by name; stages are 'stage0', 'stage1', ..., first blocks 'block0' and 'block1'."""
    named = {name: getattr(features, name) for name in ('logits', 'feature', 'pre_logits', 'prefix')}
    named.update({f'stage{i}': stage for i, stage in enumerate(features.stages)})
    named.update({f'block{i}': block for i, block in enumerate(features.blocks)})
    return {name: value for name, value in named.items() if value is not None}


def unflatten_features(values: Mapping[str, torch.Tensor]) -> Features:
    """Return the features that `flatten_features` was given; stages that are left out have no elements."""
    stages, blocks = (_in_order(values, name) for name in ('stage', 'block'))
    return Features(
        values.get('logits'), values.get('feature'), values.get('pre_logits'), stages, blocks=blocks,
        prefix=values.get('prefix'))


def _in_order(values: Mapping[str, torch.Tensor], prefix: str) -> Tuple[torch.Tensor, ...]:
    found = {int(name[len(prefix):]): value for name, value in values.items() if name.startswith(prefix)}
    return tuple(found.get(i, torch.empty(0)) for i in range(max(found, default=-1) + 1))
