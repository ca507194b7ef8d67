"""End of a run: whether its newest state is on disk, whether the student is any good, and its release."""
import logging
import math
import os
from argparse import Namespace
from typing import Any, Dict, List, Sequence

from safetensors import SafetensorError

from ..checkpoint.choice import find_newest
from ..checkpoint.file import describe_space, why_unwritten
from ..checkpoint.saver import DistillCheckpointSaver
from ..engine.meters import NonFiniteLossError
from ..errors import LostStateError
from ..export.release import export_hub, load_release, push_to_hub
from ..models.external import is_external
from ..report.trackers import Summary
from .divergence import MAX_BAD_UPDATES

_logger = logging.getLogger(__name__)


def why_lost(saver: DistillCheckpointSaver, folder: str, how_to_resume: str) -> str:
    """Return, in words, why the newest state of a run is not on disk and what is; '' where it is."""
    reason = saver.unsaved
    if not reason and saver.newest and not os.path.isfile(saver.newest):
        reason = f'{saver.newest} was written and is gone'
    if not reason:
        return ''
    newest = find_newest(folder) if os.path.isdir(folder) else None
    rest = f'The newest state there is: {newest[0]}. {how_to_resume}.' if newest else 'Nothing is saved.'
    return (
        f'the newest state of the run is not on disk: {reason}. {saver.space()} {rest} Fewer files: '
        '--checkpoint-hist, --recovery-interval; another place: --output.')


def check_student(
        saver: DistillCheckpointSaver,
        history: Sequence[Dict[str, Any]],
        streak: int,
        best_path: str,
) -> None:
    """Check that weights, losses and updates at the end of a run are finite.

    Args:
        saver: Saver of the run.
        history: Metrics of its epochs.
        streak: Updates at its end that were skipped.
        best_path: Checkpoint of the best epoch, '' for none.

    Raises:
        NonFiniteLossError: If they are not.
    """
    newest = max(history, key=lambda x: x['epoch'], default=None)
    loss = {**newest['train'], **newest.get('validation', {})}.get('loss', 0.) if newest else 0.
    reason = '' if saver.finite else saver.diverged
    if not reason and not math.isfinite(loss):
        reason = f'the loss of its newest epoch is {loss}'
    if not reason and streak >= MAX_BAD_UPDATES:
        reason = f'its newest {streak} updates were not finite and were skipped'
    if reason:
        best = f' {best_path} is the best epoch before.' if best_path else ''
        raise NonFiniteLossError(
            f'The run ended with a student that is no good: {reason}. No hub folder was '
            f'written.{best} A lower --lr or --clip-grad may help.')


def check_complete(saver: DistillCheckpointSaver, summary: Summary, reason: str) -> None:
    """Check that a run ends with its last checkpoint and with all rows of its summary.

    Args:
        saver: Saver of the run.
        summary: Its summary.
        reason: Why its newest state is lost, '' where it is not.

    Raises:
        LostStateError: If it does not.
    """
    if not reason and not os.path.isfile(saver.last_path):
        reason = f'the run ended without {saver.last_path}. {saver.space()}'
    if not reason and summary.unwritten:
        summary.write()  # what was written since may have made room
    if not reason and summary.unwritten:
        reason = (
            f'all epochs are trained and saved, but {summary.path} lacks the newest of them: '
            f'{summary.unwritten}. {saver.space()}')
    if reason:
        raise LostStateError(reason)


def release_student(checkpoint: str, output_dir: str, args: Namespace) -> None:
    """Write a student in the hub's format beside its checkpoints, and push it where that is asked for.

    Args:
        checkpoint: Checkpoint of the best epoch; nothing is done for ''.
        output_dir: Folder of the run.
        args: Training arguments.

    Raises:
        LostStateError: If it cannot be written.
    """
    if not checkpoint:
        return
    release = load_release(checkpoint, model_name=str(args.model))
    path = os.path.join(output_dir, 'hub')
    try:
        folder = export_hub(release, path)
    except (OSError, SafetensorError) as e:
        raise LostStateError(
            f'all epochs are trained and saved, but {path} could not be written: {why_unwritten(e)}. '
            f'{describe_space(output_dir)} To write it later: python -m timm_distill.export {checkpoint}') from e
    if is_external(release.architecture):
        _logger.info(f'The student: {folder}, not a model of timm; its README.md says how to load it.')
    else:
        _logger.info(f"The student: timm.create_model('local-dir:{folder}', pretrained=True)")
    if args.push_to_hub:
        _logger.info(f'Pushed to {push_to_hub(folder, args.push_to_hub)}')


def rank_epochs(history: Sequence[Dict[str, Any]], metric: str, decreasing: bool) -> List[Dict[str, Any]]:
    """Return the epochs as timm prints them, the best last; those without a finite metric are the worst."""
    worst = math.inf if decreasing else -math.inf
    values = [({**x['train'], **x.get('validation', {})}[metric], x) for x in history]
    ranked = sorted(values, key=lambda v: v[0] if math.isfinite(v[0]) else worst, reverse=decreasing)
    return [x for _, x in ranked]
