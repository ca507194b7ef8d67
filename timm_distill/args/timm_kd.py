"""Distillation as timm's own script spells it, translated into --teacher, --kd and --kd-kwargs."""
import argparse
import logging
from typing import Any, Dict, Sequence, Tuple

from ..errors import UsageError

_logger = logging.getLogger(__name__)

# Without a teacher timm ignores all of these.
_UNSET: Dict[str, Any] = {
    'kd_distill_type': 'logit',
    'kd_loss_type': 'kl',
    'kd_temperature': 4.0,
    'kd_student_feature_dim': None,
    'kd_teacher_feature_dim': None,
    'kd_token_distill_type': 'soft',
}


def translate_timm_distillation(args: argparse.Namespace, methods: Sequence[str]) -> None:
    """Set `teacher`, `kd`, `kd_kwargs` and the weights from timm's `--kd-model-name` and the flags that go with it.

    Args:
        args: Training arguments, changed in place; as they were where `--kd-model-name` is absent.
        methods: Names of the methods there are.

    Raises:
        UsageError: For flags that contradict one another, and for what no method does.
    """
    if args.kd_model_name is None:
        ignored = [f'--{name.replace("_", "-")}' for name, unset in _UNSET.items() if getattr(args, name) != unset]
        if ignored:
            _logger.warning(f'{", ".join(ignored)} ignored: they go with --kd-model-name.')
        return
    if args.teacher not in (None, args.kd_model_name):
        raise UsageError(
            f'--kd-model-name {args.kd_model_name} and --teacher {args.teacher} name two teachers: '
            'leave out one of the two')
    if args.kd is not None:
        raise UsageError(
            f'--kd-model-name comes with --kd-distill-type, not with --kd {args.kd}: '
            'name the teacher by --teacher instead')
    if args.kd_loss_type != 'kl':
        raise UsageError(f"--kd-loss-type '{args.kd_loss_type}': timm knows kl alone")
    for name in ('kd_student_feature_dim', 'kd_teacher_feature_dim'):
        if getattr(args, name) is not None:
            _logger.warning(f'--{name.replace("_", "-")} ignored: the width is measured.')
    method, options = _method_of(args)
    if method not in methods:
        raise UsageError(
            f'--kd-distill-type {args.kd_distill_type} has no counterpart here; --kd takes: '
            f'{", ".join(methods)}')
    args.teacher, args.kd = args.kd_model_name, method
    if args.task_loss_weight is not None and args.distill_loss_weight is None and not args.kd_weight:
        args.distill_loss_weight = _complement(args.task_loss_weight)
    args.kd_kwargs = {**{f'{method}.{key}': value for key, value in options.items()}, **args.kd_kwargs}
    for name, unset in {'kd_model_name': None, **_UNSET}.items():  # the run's args.yaml shall say it once
        setattr(args, name, unset)


def _complement(task_loss_weight: float) -> float:
    """Return the weight that timm's tasks give the distillation loss where that of the task loss alone is given."""
    if task_loss_weight > 1:
        raise UsageError(
            f'--task-loss-weight {task_loss_weight:g} alone leaves the distillation loss 1 minus it, a '
            'negative weight: give --distill-loss-weight too, or a value from 0 to 1.')
    return 1. - task_loss_weight


def _method_of(args: argparse.Namespace) -> Tuple[str, Dict[str, Any]]:
    """Return the method's name and options that do what timm's task does."""
    if args.kd_distill_type == 'feature':
        return 'feature', {}
    if args.kd_distill_type == 'token':
        return 'token', {'hard': args.kd_token_distill_type == 'hard', 'temperature': args.kd_temperature}
    return 'kd', {'temperature': args.kd_temperature}
