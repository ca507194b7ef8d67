"""Choice of the checkpoint that a run resumes from: the one that is named, or the newest good one of its folder."""
import argparse
import logging
import os
from typing import Any, Dict, List, Optional, Tuple

from ..errors import UsageError
from ..utils.settings import settle
from ..utils.text import model_file_name
from .file import DamagedFileError, read_checkpoint
from .lock import FolderLock
from .run_files import (
    RunFile,
    describe_checkpoint,
    list_run_files,
    nonfinite_tensors,
    own_files,
    used_by,
    weights_of,
)

_logger = logging.getLogger(__name__)

__all__ = ['belongs_to', 'find_newest', 'find_rollback', 'resolve_resume']


def resolve_resume(args: argparse.Namespace, lock: Optional[FolderLock] = None) -> Optional[Dict[str, Any]]:
    """Read what `--resume` names; for `auto` the newest good checkpoint of the run's folder, if there is one.

    Sets `args.resume` to the file, and with `auto` also `args.output` and `args.experiment` to its folder. Without
    `--experiment` that is `--output` itself, or the newest run of the student in it.

    Args:
        args: Flags of this run.
        lock: Takes the folder before anything is read there.

    Raises:
        UsageError: The file cannot be read, or it is damaged and no former one beside it is good; another process
            uses the folder.
    """
    if not args.resume:
        return None
    if args.resume != 'auto':
        path, checkpoint = _read_or_fall_back(args.resume)
        _check_named(path, checkpoint)
        settle(args, resume=path)
        return checkpoint
    for folder in _run_folders(args):
        if lock is not None and os.path.isdir(folder):
            lock.acquire(folder)
        newest = find_newest(folder)
        if newest is not None:
            output, experiment = os.path.split(os.path.abspath(folder))
            settle(args, resume=newest[0], output=output, experiment=experiment)
            return newest[1]
        used = used_by(folder)
        if used:
            raise UsageError(
                f'--resume auto: {folder!r} holds {", ".join(used[:4])}{", ..." if len(used) > 4 else ""} '
                'and no good checkpoint to go on from, see the messages above. Name one with --resume '
                'FILE, or begin again with --overwrite or another --experiment.')
    _logger.info('--resume auto: there is no checkpoint yet, this is a new run.')
    settle(args, resume='')
    return None


def _run_folders(args: argparse.Namespace) -> List[str]:
    root = args.output or './output/train'
    if args.experiment:
        return [os.path.join(root, args.experiment)]
    if not os.path.isdir(root):
        return []
    if used_by(root):
        return [root]
    runs = [name for name in os.listdir(root) if f'-{model_file_name(args.model)}-' in name]
    return [os.path.join(root, name) for name in sorted(runs, reverse=True)]  # names begin with the time


def _check_named(path: str, checkpoint: Dict[str, Any]) -> None:
    """Refuse weights that are not finite, warn of other marks: somebody asked for this very file."""
    nonfinite = _nan_weights(checkpoint)
    if nonfinite:
        raise UsageError(
            f'--resume {path}: its weights are not finite ({nonfinite}), nothing can be trained from '
            'them. Name an earlier checkpoint, or --resume auto for the newest good one.')
    diverged = describe_checkpoint(path, checkpoint).diverged
    if diverged:
        _logger.warning(
            f'{path!r} was written while the run diverged ({diverged}); --resume auto takes the newest '
            'good checkpoint instead.')


def _nan_weights(checkpoint: Dict[str, Any]) -> str:
    """Return the names of weights that are not finite, '' for none."""
    run = checkpoint.get('run')
    if run and run.get('finite', True):  # looked at when it was written
        return ''
    return ', '.join(nonfinite_tensors(weights_of(checkpoint), constant=None)[:3])


def find_newest(folder: str) -> Optional[Tuple[str, Dict[str, Any]]]:
    """Return path and content of the newest good checkpoint of the folder's own run; warns of what is left out.

    Newest is what was written last, whatever its epoch. Good is what is neither damaged, nor written while updates
    were not finite, nor holds weights that are not.
    """
    return _first_good(own_files(list_run_files(folder)))


def find_rollback(folder: str, origin: int, end: int) -> Optional[Tuple[str, Dict[str, Any]]]:
    """Return path and content of the checkpoint to go back to: the newest good one, and if the run diverged again
    right behind the one of the last time, an earlier one.

    Args:
        folder: Folder of the run.
        origin: Number of the save that the run went back to the last time, 0 for none.
        end: Number of the newest save at that time.
    """
    files = own_files(list_run_files(folder))
    first = [file for file in files if not file.copy_of and (file.save > end or file.save < origin)]
    return _first_good([*first, *(file for file in files if file not in first)])


def _first_good(files: List[RunFile]) -> Optional[Tuple[str, Dict[str, Any]]]:
    for file in files:
        if file.diverged:
            _logger.warning(f'Passed over: {file.path!r} was written while the run diverged ({file.diverged}).')
            continue
        try:
            checkpoint = read_checkpoint(file.path)
        except UsageError as e:
            _logger.warning(f'Falling back to an earlier checkpoint: {e}')
            continue
        nonfinite = _nan_weights(checkpoint)
        if not nonfinite:
            return file.path, checkpoint
        _logger.warning(f'Passed over: the weights in {file.path!r} are not finite ({nonfinite}).')
    return None


def belongs_to(folder: str, path: str, checkpoint: Dict[str, Any]) -> bool:
    """Return whether a checkpoint lies in a folder and is of the run whose files are there."""
    if os.path.dirname(os.path.realpath(path)) != os.path.realpath(folder):
        return False
    files = own_files(list_run_files(folder, quiet=True), quiet=True)
    return not files or files[0].run_id == describe_checkpoint(path, checkpoint).run_id


def _read_or_fall_back(path: str) -> Tuple[str, Dict[str, Any]]:
    """Read a file; where it is damaged, warn and read the newest good one of its folder."""
    try:
        return path, read_checkpoint(path)
    except DamagedFileError as e:
        newest = find_newest(os.path.dirname(path) or '.')
        if newest is None:
            raise
        _logger.warning(f'{e} Going on from {newest[0]} instead.')
        return newest
