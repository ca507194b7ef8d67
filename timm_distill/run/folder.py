"""The folder of a run: its name, its lock, and what may lie in it when a run begins."""
import argparse
import os
from datetime import datetime
from typing import Any, Dict, Optional

from timm.utils.distributed import world_info_from_env

from ..checkpoint.choice import belongs_to, resolve_resume
from ..checkpoint.lock import FolderLock
from ..checkpoint.run_files import remove_run, used_by
from ..errors import UsageError
from ..utils.text import model_file_name
from .state import Run


def create_lock() -> FolderLock:
    """Return the lock of this run's folder, which the first rank alone takes."""
    return FolderLock(enabled=world_info_from_env()[1] == 0)


def open_run(args: argparse.Namespace, lock: FolderLock) -> Optional[Dict[str, Any]]:
    """Lock the folder where there is one, read what `--resume` names, and refuse the folder of another run.

    Raises:
        UsageError: As `resolve_resume`, and if the folder holds another run or another process uses it.
    """
    if args.experiment and os.path.isdir(_named_folder(args)):
        lock.acquire(_named_folder(args))
    checkpoint = resolve_resume(args, lock)
    if args.experiment:
        check_unused(args, _named_folder(args), checkpoint)
    return checkpoint


def create_folder(
        args: argparse.Namespace,
        input_size: int,
        checkpoint: Optional[Dict[str, Any]],
        lock: FolderLock,
) -> str:
    """Create the folder, lock it and return its path; on the first rank, when all that can fail has been done.

    Args:
        args: Flags of the run.
        input_size: Part of the name without `--experiment`.
        checkpoint: What `--resume` read.
        lock: Held from here on.
    """
    folder = _named_folder(args)
    if args.experiment:
        os.makedirs(folder, exist_ok=True)
    else:
        name = '-'.join([datetime.now().strftime('%Y%m%d-%H%M%S'), model_file_name(args.model), str(input_size)])
        folder = _create_new(os.path.join(folder, name))
    lock.acquire(folder)
    check_unused(args, folder, checkpoint)  # another run may have begun here in the meantime
    if args.overwrite:
        remove_run(folder)
    return folder


def check_has_epochs(run: Run, checkpoint: Optional[Dict[str, Any]], start_epoch: int) -> None:
    """Refuse a checkpoint of another folder that has all epochs behind it: the run would end with nothing saved.

    Raises:
        UsageError: Names the flags to choose from.
    """
    args = run.args
    if checkpoint is None or start_epoch < run.last_epoch:
        return
    if not args.experiment or not belongs_to(_named_folder(args), args.resume, checkpoint):
        raise UsageError(
            f'--resume {args.resume} has {start_epoch} epochs behind it and this run ends after '
            f'{run.last_epoch}: nothing is left to train. Give more --epochs or another --stop-epoch, or with '
            '--output and --experiment the folder of that run.')


def _named_folder(args: argparse.Namespace) -> str:
    return os.path.join(args.output or './output/train', args.experiment)


def _create_new(path: str) -> str:
    """Create a folder that nobody has, under the next free name: two runs may begin within the same second."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    for name in (path, *(f'{path}-{i}' for i in range(1, 1000))):
        try:
            os.mkdir(name)
            return name
        except FileExistsError:
            continue
    raise UsageError(f'There are 1000 folders {path}-N: give the run a name with --experiment.')


def check_unused(args: argparse.Namespace, folder: str, checkpoint: Optional[Dict[str, Any]]) -> None:
    """Refuse a folder that holds another run than the one that `--resume` goes on with.

    Raises:
        UsageError: Names what lies there and the flags to choose from.
    """
    continues = checkpoint is not None and belongs_to(folder, args.resume, checkpoint)
    if continues and args.overwrite:
        raise UsageError(
            f'--overwrite would remove the run that --resume {args.resume} goes on with: leave out one of '
            'the two')
    used = used_by(folder)
    if used and not continues and not args.overwrite:
        raise UsageError(
            f'The folder {folder!r} holds a run already ({", ".join(used[:4])}'
            f'{", ..." if len(used) > 4 else ""}): --resume auto goes on with it, --overwrite removes it '
            'and begins anew, another --experiment leaves it alone')
