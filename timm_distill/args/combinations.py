"""Flags that exclude or need one another. One small function per subject; each names the flag to change."""
import argparse
import logging
from typing import Sequence

from ..errors import UsageError

_logger = logging.getLogger(__name__)

CROP_SCALE = (0.08, 1.)
CROP_RATIO = (3 / 4, 4 / 3)
PROBE_METRICS = ('knn', 'linear_probe')  # of frozen features and the labels of --probe-dir
_EVAL_METRICS = {
    'classification': ('top1', 'top5', 'loss', *PROBE_METRICS, 'cosine'),
    'multilabel': ('map', 'micro_f1', 'macro_f1', 'sample_f1', 'loss'),
}


def check_train_combinations(args: argparse.Namespace) -> None:
    """Reject combinations of training flags that cannot work, warn of flags without effect.

    Raises:
        UsageError: Names the flags and which to change.
    """
    for check in (
            _check_aug_splits, _check_naflex, _check_size_schedule, _check_targets, _check_labels, _check_probes,
            _check_schedule, _check_run):
        check(args)
    _warn_of_flags_without_effect(args)


def check_metric(args: argparse.Namespace) -> None:
    """Reject an `--eval-metric` that the evaluation does not give."""
    allowed = _EVAL_METRICS[args.task]
    if args.eval_metric not in allowed:
        raise UsageError(
            f"--eval-metric '{args.eval_metric}' must be one of {', '.join(allowed)} "
            f'with --task {args.task}')


def _join(values: Sequence[float]) -> str:
    return ' '.join(map(str, values))


def _reject(condition: object, message: str) -> None:
    if condition:
        raise UsageError(message)


def _mixes(args: argparse.Namespace) -> bool:
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def _check_aug_splits(args: argparse.Namespace) -> None:
    splits = args.aug_splits
    _reject(splits == 1 or splits < 0, f'--aug-splits {splits} must be 0 (off) or at least 2')
    _reject(splits and args.no_prefetcher, '--aug-splits needs the prefetcher: leave out --no-prefetcher')
    _reject(splits and _mixes(args), '--aug-splits does not go with --mixup and --cutmix: leave out one of the two')
    _reject(
        (args.jsd_loss or args.loss == 'jsd') and splits < 2,
        'The Jensen-Shannon loss compares views of an image: give --aug-splits 2 or more')
    _reject(
        args.split_bn and splits < 2 and not args.resplit,
        '--split-bn splits batches by view: give --aug-splits 2 or more, or --resplit')
    _reject(args.split_bn and args.sync_bn, '--split-bn does not go with --sync-bn: leave out one of the two')


def _check_naflex(args: argparse.Namespace) -> None:
    if not args.naflex_loader:
        return
    _reject(
        args.train_img_sizes is not None,
        '--naflex-loader and --train-img-sizes are two ways to vary the size: leave out one of the two')
    _reject(args.use_multi_epochs_loader, '--naflex-loader does not go with --use-multi-epochs-loader')
    _reject(args.aug_splits, '--naflex-loader does not go with --aug-splits')
    _reject(args.aug_repeats, '--naflex-loader does not go with --aug-repeats')
    _reject(
        args.train_crop_mode == 'pad',
        '--naflex-loader crops to lengths of sequences: --train-crop-mode pad works without it')
    _reject(args.no_prefetcher, '--naflex-loader needs the prefetcher, which normalises patches: '
                                'leave out --no-prefetcher')
    _reject(args.channels_last, '--naflex-loader loads patches, which have no --channels-last order')
    _reject(args.tta > 1, '--naflex-loader does not go with --tta')
    _reject(args.kd != 'none', f'--naflex-loader gives sequences of patches, and teachers read images: '
                               f'--kd {args.kd} works without it, and --kd none with it')
    probs, sizes = args.naflex_patch_size_probs, args.naflex_patch_sizes or []
    _reject(
        probs is not None and len(probs) != len(sizes),
        f'--naflex-patch-size-probs has {len(probs or [])} values for {len(sizes)} --naflex-patch-sizes')
    _reject(probs is not None and sum(probs) == 0, '--naflex-patch-size-probs are all 0')


def _check_size_schedule(args: argparse.Namespace) -> None:
    sizes = args.train_img_sizes
    if sizes is None:
        return
    lists = (('--train-batch-sizes', args.train_batch_sizes), ('--train-size-probs', args.train_size_probs))
    for flag, values in lists:
        _reject(
            values is not None and len(values) != len(sizes),
            f'{flag} has {len(values or [])} values for {len(sizes)} --train-img-sizes')
    _reject(args.use_multi_epochs_loader, '--train-img-sizes does not go with --use-multi-epochs-loader')
    _reject(args.aug_splits, '--train-img-sizes does not go with --aug-splits')
    _reject(
        _mixes(args) and any(size % 2 for size in args.train_batch_sizes or []),
        '--train-batch-sizes must be even with --mixup or --cutmix, which mix in pairs')


def _check_targets(args: argparse.Namespace) -> None:
    check_metric(args)
    _reject(
        args.target_format == 'multihot' and args.task != 'multilabel',
        '--target-format multihot needs --task multilabel')
    _reject(
        args.task == 'multilabel' and args.teacher_classes and args.kd != 'none',
        f'--teacher-classes {args.teacher_classes} restricts a distribution over classes, which --task multilabel does '
        'not have: leave it out')
    _reject(args.task == 'multilabel' and args.jsd_loss, '--jsd-loss needs one label per image: not --task multilabel')
    for flag, given, loss in (('--bce-loss', args.bce_loss, 'bce'), ('--jsd-loss', args.jsd_loss, 'jsd')):
        _reject(given and args.loss not in (None, loss), f'{flag} contradicts --loss {args.loss}: leave out one')
    _reject(
        args.bce_pos_weight is not None and args.loss_pos_weight is not None,
        '--bce-pos-weight and --loss-pos-weight are the same: leave out one of the two')
    is_bce = args.bce_loss or args.loss == 'bce' or (args.task == 'multilabel' and args.loss is None)
    _reject(
        not is_bce and (args.bce_sum or args.bce_target_thresh is not None or args.bce_pos_weight is not None),
        '--bce-sum, --bce-target-thresh and --bce-pos-weight need --bce-loss')


def _check_labels(args: argparse.Namespace) -> None:
    why = '--no-labels' if args.no_labels else '--num-classes 0' if args.num_classes == 0 else ''
    if not why:
        return
    _reject(args.task == 'multilabel', f'--task multilabel reads labels: it does not go with {why}')
    _reject(args.class_map, f'--class-map {args.class_map} gives labels: it does not go with {why}')
    _reject(args.teacher_classes, f'--teacher-classes matches names of labelled classes: it does not go with {why}')
    _reject(args.jsd_loss or args.loss, f'--loss and --jsd-loss are losses on labels: they do not go with {why}')


def _check_probes(args: argparse.Namespace) -> None:
    probes = args.probe_interval or args.eval_metric in PROBE_METRICS
    _reject(
        args.probe_dir and not probes,
        f'--probe-dir {args.probe_dir} is not read: give --probe-interval N, or --eval-metric knn')
    _reject(
        probes and args.naflex_loader,
        '--naflex-loader gives sequences of patches, the probes read images: leave out --probe-interval')
    _reject(
        probes and args.task == 'multilabel' and not args.probe_dir,
        'The probes need one label per image: with --task multilabel give them a --probe-dir')


def _check_schedule(args: argparse.Namespace) -> None:
    _reject(
        args.sched == 'plateau' and args.sched_on_updates,
        '--sched plateau follows the validation of each epoch: leave out --sched-on-updates')
    _reject(
        args.stop_epoch is not None and args.stop_epoch > args.epochs,
        f'--stop-epoch {args.stop_epoch} is beyond --epochs {args.epochs}')
    milestones = args.decay_milestones
    _reject(milestones != sorted(milestones), f'--decay-milestones {_join(milestones)} must not decrease')
    noise = args.lr_noise
    _reject(
        noise is not None and (len(noise) > 2 or noise != sorted(noise)),
        f'--lr-noise {_join(noise or [])} must be one or two numbers, smallest first')
    _reject(
        noise is not None and args.lr_noise_std > 100 * args.lr_noise_pct,
        f'--lr-noise-std {args.lr_noise_std:g} is more than 100 times --lr-noise-pct {args.lr_noise_pct:g}: noise '
        'is drawn again until it is below the latter')


def _check_run(args: argparse.Namespace) -> None:
    _reject(args.torchscript, '--torchscript is not supported: a scripted student can neither be given an adapter nor '
                              'be saved as a plain timm model; --torchcompile makes training faster')
    _reject(
        args.overwrite and args.resume == 'auto',
        '--overwrite removes the run that --resume auto would go on with: leave out one of the two')
    _reject(args.wandb_resume_id and not args.resume, '--wandb-resume-id goes on with a run: give --resume too')


def _warn_of_flags_without_effect(args: argparse.Namespace) -> None:
    for flag, given, needed, present in (
            ('--no-resume-opt', args.no_resume_opt, '--resume', args.resume),
            ('--resume-data-changed', args.resume_data_changed, '--resume', args.resume),
            ('--torchcompile-mode', args.torchcompile_mode, '--torchcompile', args.torchcompile),
            ('--resplit', args.resplit, '--reprob', args.reprob or args.split_bn),
            ('--train-batch-sizes', args.train_batch_sizes, '--train-img-sizes', args.train_img_sizes),
            ('--naflex-patch-sizes', args.naflex_patch_sizes, '--naflex-loader', args.naflex_loader),
            ('--wandb-project', args.wandb_project, '--log-wandb', args.log_wandb),
            ('--teacher-weights', args.teacher_weights, '--teacher-checkpoint', args.teacher_checkpoint),
            ('--cache-views', args.cache_views, '--teacher-cache', args.teacher_cache),
            ('--cache-topk', args.cache_topk is not None, '--teacher-cache', args.teacher_cache),
            ('--cache-precision', args.cache_precision, '--teacher-cache', args.teacher_cache),
            ('--cache-check', args.cache_check, '--teacher-cache', args.teacher_cache),
    ):
        if given and not present:
            _logger.warning(f'{flag} has no effect without {needed}.')
    for flag, value, default in (('--scale', args.scale, CROP_SCALE), ('--ratio', args.ratio, CROP_RATIO)):
        if args.train_crop_mode == 'pad' and tuple(value) != default:
            _logger.warning(f'{flag} has no effect with --train-crop-mode pad.')
    if args.warmup_epochs >= args.epochs and not args.warmup_prefix:
        _logger.warning(
            f'--warmup-epochs {args.warmup_epochs} takes all of --epochs {args.epochs}: the learning rate '
            'does not get beyond its warmup.')
    if args.lr and args.min_lr > args.lr:
        _logger.warning(f'--min-lr {args.min_lr:g} is above --lr {args.lr:g}: the schedule rises to it.')
    if args.drop_connect is not None:
        _logger.warning('--drop-connect has no effect, as in timm: use --drop-path.')
