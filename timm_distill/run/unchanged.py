"""Comparison of data and teacher with those that a checkpoint was written with, on all processes."""
import argparse
import logging
from typing import Any, Dict, List, Optional

import torch.distributed as dist

from ..args.per_teacher import teachers_of, value_for
from ..checkpoint.resume import check_same_run
from ..data import describe_changes, digest_fingerprint, known_names
from ..errors import UsageError
from ..methods._scopes import join_scope
from ..models.external import code_digest
from ..teacher.several import Teachers, ask_each, teachers_by_name
from .state import Run, fingerprints, weights_in_force

_logger = logging.getLogger(__name__)


def check_equal_data(args: argparse.Namespace, fingerprints: Dict[str, Any]) -> None:
    """Compare the data of all processes: with other files or labels each would train on something else.

    Args:
        args: Flags.
        fingerprints: Of this process' datasets by name.

    Raises:
        UsageError: Names the process whose data differ from the first one's, and in what.
    """
    if not args.distributed:
        return
    ranks: List[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, {name: digest_fingerprint(value) for name, value in fingerprints.items()})
    other = [str(rank) for rank, digests in enumerate(ranks) if digests != ranks[0]]
    if other:
        raise UsageError(
            f'--data-dir {args.data_dir or args.data} holds other images or classes for the '
            f'processes {", ".join(other)} than for process 0: give all the same data')


def check_unchanged(run: Run, checkpoint: Dict[str, Any]) -> bool:
    """Compare a run with the checkpoint that it goes on from: flags, teacher and data.

    Returns:
        Whether the training data are others, which `--resume-data-changed` allows.

    Raises:
        UsageError: If something else differs that has to be the same; names the difference.
    """
    # weights that are not loaded are drawn by every rank and then the first one's
    teacher_hash = (ask_each(run.task.teacher, lambda one: one.digest) or '') if run.args.rank == 0 else ''
    check_same_run(run.args, checkpoint, teacher_hash)
    check_same_teacher_input(run, checkpoint)
    check_same_teacher_classes(run, checkpoint)
    check_same_code(run, checkpoint)
    check_same_targets(run, checkpoint)
    check_same_weights(run, checkpoint)
    return check_same_data(run, checkpoint)


def check_same_data(run: Run, checkpoint: Dict[str, Any]) -> bool:
    """Compare this run's data with those of a checkpoint, as far as it knows of them.

    Returns:
        Whether the training data are others, which `--resume-data-changed` allows.

    Raises:
        UsageError: If the data are others and the flag is not given; names the difference.
    """
    saved = checkpoint.get('datasets') or {}
    changes = {}
    for name in [name for name in run.loaders.fingerprints if name in saved]:
        words = describe_changes(saved[name], run.loaders.fingerprints[name])
        if words:
            changes[name] = '; '.join(words)
    if not changes:
        return False
    text = '. '.join(f'The {name} data are not those of the checkpoint: {words}' for name, words in changes.items())
    if not run.args.resume_data_changed:
        raise UsageError(
            f'{text}. Put back what {run.args.resume!r} was trained on, or go on with what there is with '
            '--resume-data-changed.')
    forgotten = ', what --kd keeps of single images and classes begins anew' if 'training' in changes else ''
    ranked = ', the best metric until now was measured on other images' if 'validation' in changes else ''
    _logger.warning(f'{text}. The run goes on with them, but not as if it had never stopped{forgotten}{ranked}.')
    return 'training' in changes


def _saved_for(run: Run, saved: Any, name: str) -> Any:
    """Return what a checkpoint has of one teacher: of several it has it by name."""
    return saved.get(name) if isinstance(run.task.teacher, Teachers) and saved is not None else saved


def check_same_teacher_input(run: Run, checkpoint: Dict[str, Any]) -> None:
    """Compare what is done to each teacher's images with what was done when a checkpoint was written.

    Raises:
        UsageError: If it is something else; names the difference.
    """
    for name, teacher in teachers_by_name(run.task.teacher).items():
        saved = _saved_for(run, checkpoint.get('teacher_input'), name)
        if not saved:
            continue
        now = teacher.preprocessing.values()
        if (checkpoint.get('data_config') or {}).get('input_size') != run.data_config['input_size']:
            saved = {**saved, 'input_size': now['input_size']}  # may follow the student's, of which the flags warn
        changes = [
            f'{key} {_text(saved[key])} -> {_text(value)}' for key, value in now.items()
            if key in saved and _text(saved[key]) != _text(value)]
        if changes:
            what = f"a teacher '{name}' with" if name else 'a teacher with'
            raise UsageError(
                f'{run.args.resume!r} was distilled from {what} other preprocessing: '
                f'{", ".join(changes)}. Give the teacher as it was (its config.json, its checkpoint, '
                '--teacher-mean, --teacher-std, --teacher-img-size).')


def check_same_code(run: Run, checkpoint: Dict[str, Any]) -> None:
    """Warn where the file that builds student or teacher is another than when a checkpoint was written."""
    saved = checkpoint.get('model_code') or {}
    teachers = {join_scope('teacher', name): model for name, model in teachers_of(run.args.teacher).items()}
    for role, name in {'student': run.args.model, **teachers}.items():
        digest = code_digest(name)
        if saved.get(role) and digest and saved[role] != digest:
            _logger.warning(
                f'The file of --{role.partition("@")[0]} {name} has changed since {run.args.resume!r} was written '
                f'(SHA-256 {saved[role][:12]} -> {digest[:12]}): the run goes on with the new one, but not as if it '
                'had never stopped, where that computes something else.')


def check_same_targets(run: Run, checkpoint: Dict[str, Any]) -> None:
    """Warn where a cache has other views or forms than when a checkpoint was written, whatever the flags say."""
    if 'cached_targets' not in checkpoint:
        return
    saved, now = checkpoint['cached_targets'] or {}, fingerprints(run)['cached_targets'] or {}
    changes = [
        f'{name} {saved.get(name, "none")} -> {now.get(name, "none")}' for name in {**saved, **now}
        if saved.get(name) != now.get(name)]
    if changes and run.args.rank == 0:
        _logger.warning(
            f'--teacher-cache is other than when {run.args.resume!r} was written: {", ".join(changes)}. The run goes '
            'on with the new one, but not as if it had never stopped.')


def check_same_teacher_classes(run: Run, checkpoint: Dict[str, Any]) -> None:
    """Compare each teacher's classes of every class of the student with those when a checkpoint was written.

    Raises:
        UsageError: If they are others; names the first.
    """
    for name, teacher in teachers_by_name(run.task.teacher).items():
        saved = _saved_for(run, checkpoint.get('teacher_classes'), name)
        if saved != teacher.class_sources:
            flag = f'--teacher-classes {value_for(run.args.teacher_classes, name) or ""}'.strip()
            _refuse_classes(run, flag, saved, teacher.class_sources)


def _refuse_classes(
        run: Run,
        flag: str,
        saved: Optional[List[List[int]]],
        now: Optional[List[List[int]]],
) -> None:
    if saved is None or now is None:
        raise UsageError(
            f"{run.args.resume!r} was distilled {'without' if saved is None else 'with'} a map of the teacher's "
            f"classes to the student's, here there is {'one' if saved is None else 'none'} ({flag}): give that flag as "
            'it was.')
    index = next((i for i, (a, b) in enumerate(zip(saved, now)) if a != b), min(len(saved), len(now)))
    names = known_names(run.loaders.train.dataset, run.args.num_classes)
    classes = [' '.join(map(str, lists[index])) if index < len(lists) else '' for lists in (saved, now)]
    raise UsageError(
        f"{run.args.resume!r} was distilled with other classes of the teacher for those of the student ({flag}): class "
        f"{index} ({names[index] or 'without name'}) {classes[0] or 'none'} -> {classes[1] or 'none'}. Give the file "
        'as it was.')


def _text(value: Any) -> str:
    return ' '.join(f'{v:g}' for v in value) if isinstance(value, (list, tuple)) else str(value)


def check_same_weights(run: Run, checkpoint: Dict[str, Any]) -> None:
    """Warn where the loss terms have other weights than when a checkpoint was written: the defaults may be new ones."""
    now = weights_in_force(run)
    if not now:
        return
    saved = ((checkpoint.get('provenance') or {}).get('training') or {}).get('weights')
    if not isinstance(saved, dict):
        _logger.warning(
            f'{run.args.resume!r} does not say which weights its loss terms had. Here they are '
            f'{", ".join(f"{name} {value:g}" for name, value in now.items())}: where those were others (defaults have '
            'changed), give --kd-weight and --task-loss-weight.')
        return
    changes = [
        f'{name} {saved.get(name, "none")} -> {value:g}' for name, value in now.items()
        if not isinstance(saved.get(name), (int, float)) or abs(saved[name] - value) > 1e-9 * abs(value)]
    if changes:
        _logger.warning(
            f'The weights of the loss terms are not those of {run.args.resume!r}: {", ".join(changes)}. The run goes '
            'on with the new ones, but not as if it had never stopped: --kd-weight and --task-loss-weight set them.')


def forget_data(run: Run, checkpoint: Dict[str, Any]) -> None:
    """Replace in a checkpoint what methods keep of the training data (memory banks, class means) by what is new."""
    for key in ('task_state', 'task_state_ema'):
        if (checkpoint.get(key) or {}).get('memory'):
            fresh = run.task.module.memory()
            checkpoint[key]['memory'] = {name: tensor.detach().clone() for name, tensor in fresh.items()}
