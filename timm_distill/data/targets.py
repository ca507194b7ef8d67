"""What becomes of the labels: mixing, smoothing and the loss on them."""
from argparse import Namespace
from typing import Optional

import torch
from timm.loss import create_classification_loss
from torch import nn


def is_mixup_active(args: Namespace) -> bool:
    """Whether training targets are mixed, which makes them soft: [B, num_classes]."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def create_train_loss(args: Namespace, device: Optional[torch.device] = None) -> nn.Module:
    """Loss on the labels: cross entropy or BCE, smoothed here for class indices and by mixup for mixed targets."""
    loss_fn = create_classification_loss(
        'bce' if args.bce_loss else 'ce',
        smoothing=args.smoothing,
        soft_targets=is_mixup_active(args),
        bce_target_thresh=args.bce_target_thresh,
        bce_sum=args.bce_sum,
        pos_weight=args.bce_pos_weight,
    )
    return loss_fn.to(device=device)
