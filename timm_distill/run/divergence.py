"""Divergence of a run: how far it may go, the checkpoint to go back to, and the batch that it came with."""
import logging

from ..checkpoint.choice import find_rollback
from ..checkpoint.file import why_unwritten, write_checkpoint
from ..checkpoint.saver import DistillCheckpointSaver
from ..engine.meters import NonFiniteLossError

_logger = logging.getLogger(__name__)

MAX_BAD_UPDATES = 10  # in a row, before --on-nan acts
MAX_ROLLBACKS = 3


def choose_rollback(saver: DistillCheckpointSaver, folder: str) -> str:
    """Return the checkpoint to go back to and count the rollback; '' for none."""
    if saver.num_rollbacks >= MAX_ROLLBACKS:
        return ''
    found = find_rollback(folder, saver.rollback_origin, saver.rollback_end)
    if found is None:
        return ''
    saver.note_rollback(*found)
    return found[0]


def write_bad_batch(error: NonFiniteLossError, path: str) -> str:
    """Write the batch of a divergence for a replay; returns the path, '' where there is none or no room for it."""
    if error.batch is None:
        return ''
    input, target = error.batch
    images = {name: part.cpu() for name, part in input.items()} if isinstance(input, dict) else input.cpu()
    try:
        write_checkpoint({'input': images, 'target': target.cpu(), 'reason': str(error)}, path)
    except OSError as e:
        _logger.error(f'The batch of the divergence could not be kept ({why_unwritten(e)}).')
        return ''
    return path
