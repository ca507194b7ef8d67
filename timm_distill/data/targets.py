"""Targets of the label loss: their form, and the loss on them."""
from argparse import Namespace
from typing import Any, Dict, Optional

import torch
from timm.data.target_transforms import MultiLabelTarget
from timm.loss import create_classification_loss
from timm.loss.class_weights import load_class_stats, resolve_class_weights
from torch import nn
from torch.utils.data import Dataset

from ..errors import UsageError
from .mixup import is_mixup_active


def set_multi_label_targets(args: Namespace, dataset: Any, num_classes: int) -> Dataset:
    """Let a dataset give targets as float vectors [num_classes], from class indices or from vectors."""
    dense = getattr(getattr(dataset, 'reader', None), 'dense_target', args.target_format == 'multihot')
    dataset.target_transform = MultiLabelTarget(num_classes, dense=dense)
    return dataset


def resolve_loss_type(args: Namespace) -> str:
    """Return the name that timm's loss factory knows the label loss by."""
    if args.loss:
        return args.loss
    if args.jsd_loss:
        return 'jsd'
    return 'bce' if args.bce_loss or args.task == 'multilabel' else 'ce'


def create_train_loss(args: Namespace, device: Optional[torch.device] = None, num_classes: int = 0) -> nn.Module:
    """Loss on the labels, smoothed here for class indices and by mixup for mixed targets.

    Args:
        args: Training arguments.
        device: Of its weights.
        num_classes: Outputs of the student, to check the length of class weights; 0 leaves that out.

    Raises:
        UsageError: For options that do not fit the loss, and for class weights that cannot be read.
    """
    loss_type = resolve_loss_type(args)
    try:
        loss_fn = create_classification_loss(
            loss_type,
            multi_label=args.task == 'multilabel',
            smoothing=args.smoothing,
            soft_targets=is_mixup_active(args),
            bce_target_thresh=args.bce_target_thresh,
            bce_sum=args.bce_sum,
            jsd_splits=args.aug_splits,
            poly_epsilon=args.poly_epsilon,
            poly_gamma=args.poly_gamma,
            asl_gamma_pos=args.asl_gamma_pos,
            asl_gamma_neg=args.asl_gamma_neg,
            asl_clip=args.asl_clip,
            **_class_weights(args, loss_type, num_classes),
        )
    except (ValueError, OSError) as error:
        raise UsageError(f'The label loss {loss_type} cannot be built: {" ".join(str(error).split())}') from error
    return loss_fn.to(device=device)


def _class_weights(args: Namespace, loss_type: str, num_classes: int) -> Dict[str, Any]:
    stats = load_class_stats(args.class_stats)
    pos_weight = args.bce_pos_weight if args.loss_pos_weight is None else args.loss_pos_weight
    weights = {
        'pos_weight': resolve_class_weights(pos_weight, 'pos_weight', stats, power=args.loss_weight_power),
        'class_weight': resolve_class_weights(
            args.loss_class_weight, 'class_weight', stats, power=args.loss_weight_power),
    }
    for name, weight in weights.items():
        if num_classes and isinstance(weight, torch.Tensor) and weight.numel() != num_classes:
            raise ValueError(
                f'--loss-{name.replace("_", "-")} has {weight.numel()} entries, '
                f'but the model has {num_classes} classes')
    if loss_type == 'db' and stats is not None:
        weights.update(class_counts=stats[0], num_samples=stats[1])
    return weights
