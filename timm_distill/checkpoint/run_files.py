"""Checkpoints of a run's folder: which are its own, in which order they were written, and which are no good.

Every checkpoint has a 'run' entry with the id of its run and a number that counts the saves in its folder, so that
the newest is known whatever epochs the names speak of. Files of former versions have neither: their id is '', and they
are ordered by their epochs.
"""
import logging
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from typing import Any, Dict, Iterable, List, Mapping, Optional, Set, Tuple

import torch
import torch.nn as nn

from ..errors import UsageError
from .file import flush, put_in_place, read_metadata

_logger = logging.getLogger(__name__)

__all__ = [
    'EXTENSION', 'PREVIOUS', 'RunFile', 'checkpoint_progress', 'constant_infinities', 'describe_checkpoint',
    'duplicate', 'is_temporary', 'is_unmerged', 'list_run_files', 'nonfinite_tensors', 'own_files', 'remove_run',
    'remove_temporary', 'set_aside', 'set_others_aside', 'used_by', 'weights_of',
]

EXTENSION = '.pth.tar'
PREVIOUS = f'last{EXTENSION}.previous'  # not *.pth.tar: scripts that average a folder would count it twice
_OWN_NAMES = re.compile(
    r'(last|previous|model_best|checkpoint-\d+|recovery-\d+-\d+|milestone-\d+)' + re.escape(EXTENSION)
    + '|' + re.escape(PREVIOUS))
_TEMPORARY = re.compile(r'.*\.tmp|(recovery_)?tmp' + re.escape(EXTENSION))
# what only a run leaves; the flags alone (args.yaml) are left by one that failed at its start
_TRACES = re.compile(r'summary\.csv|hub|unmerged-\d+\..*|report\.(html|png)')
_SCRAPS = re.compile(r'args\.yaml|bad-batch\.pth|train-batch-\d+\.jpg|events\.out\.tfevents\..*')
_HUB_FILES = ('config.json', 'model.safetensors', 'README.md')


@dataclass(frozen=True)
class RunFile:
    """A checkpoint by what it says of itself.

    Attributes:
        path: The file.
        run_id: Of the run that wrote it, '' before there were ids.
        save: Number of the save, 0 before there were numbers.
        progress: Epoch to start with and batches of it that are done.
        diverged: Why nobody should go on from it, '' for a good one.
        copy_of: Number of the save whose weights it holds again after a rollback, 0 for none.
    """
    path: str
    run_id: str = ''
    save: int = 0
    progress: Tuple[int, int] = (0, 0)
    diverged: str = ''
    copy_of: int = 0

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    @property
    def order(self) -> Tuple[int, Tuple[int, int]]:
        """Sorts files by when they were written; names of one file are equal."""
        return self.save, self.progress


def describe_checkpoint(path: str, checkpoint: Mapping[str, Any]) -> RunFile:
    """Return what a checkpoint that has been read says of itself."""
    run = checkpoint.get('run') or {}
    return RunFile(
        path,
        str(run.get('id', '')),
        int(run.get('save', 0)),
        checkpoint_progress(checkpoint),
        str(run.get('diverged', '')),
        int(run.get('copy_of', 0)),
    )


def checkpoint_progress(checkpoint: Mapping[str, Any]) -> Tuple[int, int]:
    """Return the epoch to start with and the batches of it that are done."""
    positions = [rank['position'] for rank in checkpoint.get('ranks', []) if rank.get('position') is not None]
    epoch = int(checkpoint.get('epoch', -1))
    if positions:
        return epoch, positions[0]['data']['num_batches']
    return (epoch + 1 if checkpoint.get('version', 1) > 1 else epoch), 0  # timm's version 1 counted up before saving


def is_temporary(name: str) -> bool:
    """Return whether a name is that of a file which a kill left half written."""
    return _TEMPORARY.fullmatch(name) is not None


def list_run_files(folder: str, unreadable: Optional[List[str]] = None, quiet: bool = False) -> List[RunFile]:
    """Return the checkpoints of a folder, the newest first; warns of files that cannot be one of a run.

    Args:
        folder: Folder of a run.
        unreadable: Gets the paths of files with a run's names that cannot be read.
        quiet: Leave out the warnings.
    """
    warn = _logger.debug if quiet else _logger.warning
    files = []
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        path = os.path.join(folder, name)
        if not is_run_name(name):
            if name.endswith(EXTENSION) and not is_temporary(name) and not name.startswith('unmerged-'):
                warn(f'Left out: {path!r} has no name that a run gives to its checkpoints.')
            continue
        try:
            files.append(describe_checkpoint(path, read_metadata(path)))
        except (UsageError, AttributeError, LookupError, TypeError, ValueError) as e:  # damaged, or not ours at all
            warn(
                f'Left out: {e}' if isinstance(e, UsageError) else
                f'Left out: {path!r} is no checkpoint of a run ({type(e).__name__}: {e}).')
            if unreadable is not None:
                unreadable.append(path)
    # hard links share what they hold: `last` comes before its numbered name
    return sorted(files, key=lambda file: (file.order, file.name.startswith(f'last{EXTENSION}')), reverse=True)


def own_files(files: Iterable[RunFile], quiet: bool = False) -> List[RunFile]:
    """Return the files of the run that a folder belongs to, in the given order; warns of those of others.

    The run is that of `last`, else the one with most files: a checkpoint that somebody copied here does not count.
    """
    files = list(files)
    counts = Counter(file.run_id for file in files)
    last = [file.run_id for file in files if file.name in (f'last{EXTENSION}', PREVIOUS)]
    run_id = last[0] if last else max(counts, key=lambda key: counts[key], default='')
    for file in files:
        if file.run_id != run_id and not quiet:
            _logger.warning(f'Left out: {file.path!r} is of another run than the files beside it.')
    return [file for file in files if file.run_id == run_id]


def used_by(folder: str) -> List[str]:
    """Return the names of what a run has left in a folder, checkpoints first; empty where a run can begin."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [name for name in names if is_run_name(name)] + [name for name in names if _TRACES.fullmatch(name)]


def remove_run(folder: str) -> None:
    """Remove what a run has left in a folder, the checkpoints last; files of others stay."""
    for name in [f'hub/{name}' for name in _HUB_FILES] + sorted(os.listdir(folder), key=is_run_name):
        path = os.path.join(folder, name)
        ours = name.startswith('hub/') or any(
            pattern.fullmatch(name) for pattern in (_TRACES, _SCRAPS, _TEMPORARY, _OWN_NAMES))
        if ours and os.path.isfile(path):
            os.remove(path)
    remove_temporary(folder)
    hub = os.path.join(folder, 'hub')
    if os.path.isdir(hub) and not os.listdir(hub):
        os.rmdir(hub)


def remove_temporary(folder: str) -> None:
    """Remove what a kill left half written in the folder of a run."""
    for name in filter(is_temporary, os.listdir(folder)):
        path = os.path.join(folder, name)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.remove(path)


def is_run_name(name: str) -> bool:
    """Return whether a run gives this name to one of its checkpoints."""
    return _OWN_NAMES.fullmatch(name) is not None


def duplicate(src: str, dst: str) -> None:
    """Give a file a second name, or a copy where the file system has no such names; `dst` is replaced in one step."""
    tmp = dst + '.tmp'
    if os.path.exists(tmp):  # left by a kill
        os.remove(tmp)
    try:
        if not is_run_name(os.path.basename(src)):
            raise NotImplementedError('a file of the user, who may write into it')
        os.link(src, tmp)
    except (OSError, NotImplementedError):
        shutil.copy2(src, tmp)
        flush(tmp)
    put_in_place(tmp, dst)
    if os.path.exists(tmp):  # replacing a name by another name of the same file does nothing
        os.remove(tmp)


def set_aside(path: str, reason: str) -> str:
    """Rename a file that is no part of the run, so that nothing counts or replaces it; returns the new path."""
    target, count = f'{path}.{reason}', 1
    while os.path.exists(target):
        count += 1
        target = f'{path}.{reason}-{count}'
    os.rename(path, target)
    return target


def set_others_aside(folder: str, start: RunFile) -> Tuple[List[RunFile], int]:
    """Rename what is no part of the course of a run up to `start`; return what is, the newest first, and the number of
    its newest save."""
    unreadable: List[str] = []
    files = list_run_files(folder, unreadable)
    own = [file for file in files if file.run_id == start.run_id]
    later = [file for file in own if file.order > start.order]
    others = [
        ('damaged', unreadable), ('other-run', [file.path for file in files if file not in own]),
        ('abandoned', [file.path for file in later])]
    moved = [os.path.basename(set_aside(path, reason)) for reason, paths in others for path in paths]
    if moved:
        _logger.warning(
            f'{folder}: the run goes on from {start.name}. What is no part of it was renamed, nothing was removed: '
            f"{', '.join(moved)}.")
    return [file for file in own if file not in later], max([start.save, *(file.save for file in own)])


def nonfinite_tensors(entries: Mapping[str, Any], constant: Optional[Iterable[str]] = ()) -> List[str]:
    """Return the names of the tensors in nested dicts that hold a nan or an infinity.

    Args:
        entries: Dicts of tensors; all else in them is passed over.
        constant: Names of buffers that are infinite by design, as bounds of clipping are. None where they are not
            known: then a tensor that holds nothing but infinities passes.
    """
    found = []
    for name, value in entries.items():
        if isinstance(value, Mapping):
            found += nonfinite_tensors(value, constant)
        elif isinstance(value, torch.Tensor) and not _is_finite(value):
            by_design = bool(value.isinf().all()) if constant is None else name in constant
            found += [] if by_design else [str(name)]
    return found


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.detach().isfinite().all())


def constant_infinities(module: nn.Module) -> Set[str]:
    """Return the names of buffers of a module, and of its parts, that are infinite before it trains."""
    names = [name for name, buffer in module.named_buffers() if not _is_finite(buffer) and not buffer.isnan().any()]
    return {name[start:] for name in names for start in [0, *(m.end() for m in re.finditer(r'\.', name))]}


def is_unmerged(checkpoint: Mapping[str, Any], path: str) -> bool:
    """Return whether a file holds a student that was written because it could not be merged."""
    former = os.path.basename(path).startswith('unmerged-') and 'task_state' in checkpoint  # before they were marked
    return 'unmerged_state_dict' in checkpoint or former


def weights_of(checkpoint: Mapping[str, Any]) -> Dict[str, Any]:
    """Return the tensors of a checkpoint that the student goes on with: its own and the adapter's, raw and averaged."""
    weights: Dict[str, Any] = {}
    for suffix in ('', '_ema'):
        weights[f'state_dict{suffix}'] = checkpoint.get(f'state_dict{suffix}')
        task_state = checkpoint.get(f'task_state{suffix}') or {}
        weights[f'task_state{suffix}'] = {name: task_state.get(name) for name in ('student', 'adapter')}
    return weights
