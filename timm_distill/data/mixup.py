"""Mixup and cutmix: in the loader's processes, in the training loop, or on patch sequences."""
from argparse import Namespace
from typing import Any, Callable, Dict, Optional, Tuple

import torch
from timm.data import FastCollateMixup, Mixup, NaFlexMixup

from .view_mixing import ViewMixing


class SwitchableCollateMixup(FastCollateMixup):
    """Mixup in the loader's processes that can be turned off while they run.

    In timm the switch reaches only the main process' copy, so that `--mixup-off-epoch` does nothing with workers.
    """

    def __init__(self, **kwargs: Any):
        self._enabled = torch.ones(1).share_memory_()
        super().__init__(**kwargs)

    @property
    def mixup_enabled(self) -> bool:
        """Whether images are mixed; the same in all processes."""
        return bool(self._enabled.item())

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        self._enabled.fill_(float(enabled))


def is_mixup_active(args: Namespace) -> bool:
    """Whether training targets are mixed, which makes them soft: [B, num_classes]."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def create_mixup(args: Namespace, num_classes: int) -> Tuple[Optional[Callable], Optional[Callable]]:
    """Mixup as a collate function or as a step of the loop: one of the two, or neither where it is off."""
    if not is_mixup_active(args):
        return None, None
    mixup_class = Mixup if args.no_prefetcher else SwitchableCollateMixup
    mixup = mixup_class(cutmix_minmax=args.cutmix_minmax, mode=args.mixup_mode, **_mixup_kwargs(args, num_classes))
    return (None, mixup) if args.no_prefetcher else (mixup, None)


def create_naflex_mixup(args: Namespace, num_classes: int) -> Optional[Callable]:
    """Mixup of patch sequences, which knows neither `--mixup-mode` nor `--cutmix-minmax`."""
    if not is_mixup_active(args):
        return None
    return NaFlexMixup(mixup_off_epoch=args.mixup_off_epoch, **_mixup_kwargs(args, num_classes))


def create_view_mixing(args: Namespace, num_classes: int, num_samples: int) -> Optional[ViewMixing]:
    """Mixup of views that are replayed; None where it is off."""
    if not is_mixup_active(args):
        return None
    return ViewMixing(
        num_samples, args.mixup_mode, cutmix_minmax=args.cutmix_minmax, **_mixup_kwargs(args, num_classes))


def _mixup_kwargs(args: Namespace, num_classes: int) -> Dict[str, Any]:
    return dict(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        label_smoothing=args.smoothing,
        num_classes=max(num_classes, 1),  # without labels all images are of class 0
        multi_label=args.task == 'multilabel',
    )
