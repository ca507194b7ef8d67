"""Student of a run as the flags describe it, and the input that it runs at."""
import argparse
import logging
import os
from typing import Any, Dict

import torch
import torch.nn as nn
from timm.layers import convert_splitbn_model

from ..errors import UsageError
from ..features.inputs import runnable_size
from ..features.parts import complete
from ..models.external import is_external
from ..models.named import create_model
from ..utils.settings import settle

_logger = logging.getLogger(__name__)


def build_student(args: argparse.Namespace) -> nn.Module:
    """Create the student as timm's script creates its model."""
    if args.initial_checkpoint and not os.path.isfile(args.initial_checkpoint):
        raise UsageError(f'--initial-checkpoint {args.initial_checkpoint}: there is no such file.')
    student = create_model(
        args.model, 'student', '--pretrained, --initial-checkpoint, --model-kwargs', **_student_kwargs(args))
    if is_external(args.model):
        complete(student, args.model, 'student', args.in_chans or 3, args.num_classes)
        if args.grad_checkpointing and not hasattr(student, 'set_grad_checkpointing'):
            raise UsageError(f'--grad-checkpointing: {args.model} has none, leave the flag out.')
    if args.pretrained_path and not args.pretrained:
        _logger.warning(
            f'--pretrained-path {args.pretrained_path} is not read without --pretrained, as in timm: the '
            'student starts at random.' if not args.initial_checkpoint else
            f'--pretrained-path {args.pretrained_path} is not read without --pretrained, as in timm.')
    init_head(args, student)
    if args.grad_checkpointing:
        student.set_grad_checkpointing(enable=True)
    if args.num_classes is None:
        settle(args, num_classes=student.num_classes)
    if args.split_bn:
        student = convert_splitbn_model(student, max(args.aug_splits, 2))
    return student


def comes_with_weights(args: argparse.Namespace) -> bool:
    """Whether the student starts from weights."""
    return bool(args.pretrained or args.initial_checkpoint)


def _student_kwargs(args: argparse.Namespace) -> Dict[str, Any]:
    kwargs = dict(
        pretrained=args.pretrained,
        in_chans=args.in_chans or (args.input_size[0] if args.input_size else 3),
        num_classes=args.num_classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        drop_block_rate=args.drop_block,
        global_pool=args.gp,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
        checkpoint_path=args.initial_checkpoint,
        **args.model_kwargs,
    )
    if args.pretrained_path:
        # num_classes=-1 adapts the head to this run's classes
        kwargs['pretrained_cfg_overlay'] = dict(file=args.pretrained_path, num_classes=-1)
    return kwargs


@torch.no_grad()
def init_head(args: argparse.Namespace, student: nn.Module) -> None:
    """Apply `--head-init-scale` and `--head-init-bias`."""
    if args.head_init_scale is None and args.head_init_bias is None:
        return
    classifier = student.get_classifier()
    if args.head_init_scale is not None:
        classifier.weight.mul_(args.head_init_scale)
        classifier.bias.mul_(args.head_init_scale)
    if args.head_init_bias is not None:
        nn.init.constant_(classifier.bias, args.head_init_bias)


def fit_input_size(args: argparse.Namespace, student: nn.Module, data_config: Dict[str, Any]) -> Dict[str, Any]:
    """Return the data config with a size that the student runs at: its own, where it takes no other.

    Raises:
        UsageError: If it runs at neither.
    """
    wanted = data_config['input_size']
    size, reason = runnable_size(student, wanted)
    if reason:
        raise UsageError(
            f"The student '{args.model}' cannot run on the input {list(wanted)}: {reason}. Change "
            '--img-size, --in-chans or --model-kwargs img_size=N.')
    if size is None:
        return data_config
    _logger.warning(
        f"The student '{args.model}' takes {size[0]}x{size[1]} alone: images are loaded at that size, not "
        f'at {wanted[1]}x{wanted[2]}. --model-kwargs img_size=N builds some models for other sizes.')
    return {**data_config, 'input_size': (wanted[0], *size)}


def check_train_sizes(args: argparse.Namespace, student: nn.Module, data_config: Dict[str, Any]) -> None:
    """Reject `--train-img-sizes` that the student cannot run at."""
    channels = data_config['input_size'][0]
    for size in args.train_img_sizes or ():
        other, reason = runnable_size(student, (channels, size, size))
        if reason or other is not None:
            raise UsageError(
                f"The student '{args.model}' cannot run at {size}x{size}, one of --train-img-sizes. "
                '--model-kwargs dynamic_img_size=True lets many models take any size.')
