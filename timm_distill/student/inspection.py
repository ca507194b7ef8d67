"""Inspection of a student: whether it gives what the methods read, in the forward that trains it."""
from typing import AbstractSet, Optional, Sequence

import torch.nn as nn

from ..errors import UsageError
from ..features.inputs import evaluation_mode, random_images
from ..features.inspection import inspect
from ..features.reader import MAPS, ModelSpec
from ..features.stages import drops_positions
from .tap import StudentTap


def inspect_student(
        student: nn.Module,
        input_size: Sequence[int],
        outputs: AbstractSet[str],
        tap: Optional[StudentTap] = None,
) -> Optional[ModelSpec]:
    """Return what is known of a student, None where nothing but logits is read.

    Args:
        student: timm model, without adapters. A distillation token that is read is enabled, as timm does.
        input_size: What it is fed, (channels, height, width).
        outputs: What the methods read.
        tap: Insertion point of its adapters. A model that only its own forward runs to the end is not split.

    Raises:
        UsageError: If the student does not give one of the outputs.
    """
    if 'token_logits' in outputs:
        _enable_token_head(student)
    if not outputs - {'logits', 'token_logits'}:
        return None
    whole = tap is not None and bool(tap.inside) and not outputs & MAPS
    spec = inspect(student, input_size, trains=True, whole=whole, with_head='head' in outputs)
    if spec.split and outputs & MAPS:
        spec.check(outputs)
        _check_positions(student, input_size)
    return spec


def _check_positions(student: nn.Module, input_size: Sequence[int]) -> None:
    with evaluation_mode(student):
        drops = drops_positions(student, random_images(student, input_size))
    if drops:
        raise UsageError(
            f'The student {type(student).__name__} drops positions in training, so that no feature map '
            'of it can be compared with the teacher\'s. Leave patch_drop_rate at 0 in --model-kwargs, or choose '
            '--kd methods that read no feature maps (--list-kd).')


def _enable_token_head(model: nn.Module) -> None:
    if not hasattr(model, 'set_distilled_training'):
        raise UsageError(
            f'The student {type(model).__name__} has no distillation token. Token distillation takes a student such as '
            'deit_tiny_distilled_patch16_224; for others use --kd kd (--kd-kwargs kd.hard=True for hard labels), '
            'or --kd tokens, which matches class and patch tokens of any model.')
    model.set_distilled_training(True)
