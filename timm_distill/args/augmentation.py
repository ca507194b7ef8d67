"""Flags of augmentation, mixing, regularisation and the label loss."""
from typing import Any

from timm.loss import LOSS_TYPES

from .checks import INTERPOLATIONS
from .combinations import CROP_RATIO, CROP_SCALE
from .parser import ArgumentParser


def add_augmentation_args(parser: ArgumentParser) -> None:
    group = parser.add_topic('aug', 'Augmentation')
    group.add_argument(
        '--no-aug', action='store_true', default=False,
        help='train on plain resized crops; wins over all other augmentation flags')
    group.add_argument(
        '--train-crop-mode', type=str, default=None,
        help='rrc (random resized crop), rkrc or rkrr (keep the ratio, then crop), pad (the CIFAR papers\': the image '
             'as in validation, an eighth of zeros on each side, 4 pixels at 32, then a crop at random); None: rrc')
    group.add_argument(
        '--scale', type=float, nargs='+', default=list(CROP_SCALE), metavar='PCT',
        help='smallest and largest part of the image that a training crop covers')
    group.add_argument(
        '--ratio', type=float, nargs='+', default=list(CROP_RATIO), metavar='RATIO',
        help='smallest and largest aspect ratio of a training crop')
    group.add_argument('--hflip', type=float, default=0.5, help='probability of a horizontal flip')
    group.add_argument('--vflip', type=float, default=0., help='probability of a vertical flip')
    group.add_argument(
        '--color-jitter', type=float, default=0.4, metavar='PCT',
        help='strength of brightness, contrast and saturation changes')
    group.add_argument(
        '--color-jitter-prob', type=float, default=None, metavar='PCT',
        help='probability of colour jitter; None: always')
    group.add_argument(
        '--grayscale-prob', type=float, default=None, metavar='PCT',
        help='probability of dropping all colour')
    group.add_argument('--gaussian-blur-prob', type=float, default=None, metavar='PCT', help='probability of a blur')
    group.add_argument(
        '--aa', type=str, default=None, metavar='NAME',
        help='augmentation policy, e.g. rand-m9-mstd0.5-inc1, augmix-m5-w4, v0 or original')
    group.add_argument(
        '--aug-repeats', type=float, default=0,
        help='copies of each image per epoch over all processes; distributed training only')
    group.add_argument(
        '--aug-splits', type=int, default=0,
        help='views of each image in a batch, the first without --aa; 0 or at least 2')
    group.add_argument('--reprob', type=float, default=0., metavar='PCT', help='probability of random erasing')
    group.add_argument('--remode', type=str, default='pixel', help='what erased pixels become: pixel, rand or const')
    group.add_argument('--recount', type=int, default=1, help='largest number of erased boxes')
    group.add_argument(
        '--resplit', action='store_true', default=False,
        help='no random erasing in the first of --aug-splits (without them: in half of the batch)')
    group.add_argument(
        '--train-interpolation', type=str, default='random',
        help=f'resize filter for training: random or one of {", ".join(INTERPOLATIONS)}')


def add_mixup_args(parser: ArgumentParser) -> None:
    group = parser.add_topic('mixup', 'Mixup and cutmix')
    group.add_argument('--mixup', type=float, default=0.0, help='mixup alpha; 0 is off')
    group.add_argument('--cutmix', type=float, default=0.0, help='cutmix alpha; 0 is off')
    group.add_argument(
        '--cutmix-minmax', type=float, nargs='+', default=None,
        help='smallest and largest cutmix box; turns cutmix on and replaces its alpha')
    group.add_argument('--mixup-prob', type=float, default=1.0, help='probability of mixing at all')
    group.add_argument(
        '--mixup-switch-prob', type=float, default=0.5,
        help='probability of cutmix rather than mixup where both are on')
    group.add_argument(
        '--mixup-mode', type=str, default='batch',
        help='what shares one mixing factor: batch, pair or elem')
    group.add_argument(
        '--mixup-off-epoch', type=int, default=0, metavar='N',
        help='epoch from which images are no longer mixed; 0: never')


def add_regularization_args(parser: ArgumentParser) -> None:
    group = parser.add_topic('loss', 'Regularisation and label loss')
    group.add_argument(
        '--smoothing', type=float, default=0.1,
        help='label smoothing; 0 by default with --task multilabel')
    group.add_argument('--drop', type=float, default=0.0, metavar='PCT', help='dropout rate')
    group.add_argument(
        '--drop-connect', type=float, default=None, metavar='PCT',
        help='without effect, as in timm: use --drop-path')
    group.add_argument('--drop-path', type=float, default=None, metavar='PCT', help='stochastic depth rate')
    group.add_argument('--drop-block', type=float, default=None, metavar='PCT', help='drop-block rate')
    group.add_argument(
        '--jsd-loss', action='store_true', default=False,
        help='cross entropy plus Jensen-Shannon divergence between --aug-splits')
    group.add_argument(
        '--bce-loss', action='store_true', default=False,
        help='binary cross entropy per class in place of cross entropy')
    group.add_argument(
        '--bce-sum', action='store_true', default=False,
        help='with --bce-loss: add the classes up, not average them')
    group.add_argument(
        '--bce-target-thresh', type=float, default=None,
        help='with --bce-loss: soft targets above this become 1, all others 0')
    group.add_argument(
        '--bce-pos-weight', type=float, default=None,
        help='with --bce-loss: weight of the positive term')
    add_loss_args(group)


def add_loss_args(group: Any) -> None:
    """Further label losses of timm 1.0.31."""
    group.add_argument(
        '--loss', type=str, default=None, choices=LOSS_TYPES,
        help='label loss; None: bce with --bce-loss or --task multilabel, jsd with --jsd-loss, else ce')
    group.add_argument(
        '--class-stats', type=str, default='', metavar='FILE',
        help='JSON file with pos_counts (positive samples per class) and num_samples')
    group.add_argument(
        '--loss-pos-weight', type=str, default=None, metavar='W',
        help='weight of the positive term (bce, multi-label asl): number, list a,b,c, file, or neg_pos '
             'to compute it from --class-stats')
    group.add_argument(
        '--loss-class-weight', type=str, default=None, metavar='W',
        help='weight of each class (bce, multi-label asl): list a,b,c, file, or inv_freq or '
             'effective_num to compute it from --class-stats')
    group.add_argument(
        '--loss-weight-power', type=float, default=1., metavar='P',
        help='exponent of neg_pos and inv_freq')
    group.add_argument('--poly-epsilon', type=float, default=2., help='poly: coefficient of the first polynomial term')
    group.add_argument('--poly-gamma', type=float, default=0., help='multi-label poly: focusing parameter')
    group.add_argument('--asl-gamma-pos', type=float, default=1., help='asl: focusing parameter of positives')
    group.add_argument('--asl-gamma-neg', type=float, default=4., help='asl: focusing parameter of negatives')
    group.add_argument('--asl-clip', type=float, default=0.05, help='multi-label asl: margin shifted onto negatives')
