"""The range of every numeric flag: what makes sense, which is often less than what a number can be.

A value outside would train for hours on nothing (a momentum of nan), hang (noise without bounds) or fail deep inside
timm. What timm itself uses is allowed; `tests/test_arg_ranges.py` holds that no numeric flag is left out.
"""
import argparse
from typing import Any, Dict, Tuple

from ..errors import UsageError
from ..utils.ranges import LARGEST_SIZE, NOT_NEGATIVE, Range
from .per_teacher import all_values

_COUNT = Range(1, LARGEST_SIZE)
_COUNT_OR_NONE = Range(0, LARGEST_SIZE)
_FINITE = Range()
_POSITIVE = Range(0, without_low=True)
_PROBABILITY = Range(0, 1)
_PART = Range(0, 1, without_low=True)
_BELOW_ONE = Range(0, 1, without_high=True)

RANGES: Dict[Range, Tuple[str, ...]] = {
    _COUNT: (
        'batch_size', 'cache_views', 'checkpoint_hist', 'epochs', 'grad_accum_steps', 'img_size', 'in_chans',
        'input_size',
        'kd_student_feature_dim', 'kd_teacher_feature_dim', 'log_freq', 'log_interval', 'lr_base_size',
        'lr_cycle_limit', 'naflex_max_seq_len', 'naflex_patch_sizes', 'naflex_train_seq_lens', 'num_gpu',
        'num_samples', 'recount', 'save_epochs', 'stop_epoch', 'teacher_img_size', 'train_batch_sizes',
        'train_batches_per_epoch', 'train_img_sizes', 'train_num_samples', 'val_interval', 'val_num_samples',
        'validation_batch_size'),
    _COUNT_OR_NONE: (
        'aug_splits', 'cache_check', 'cache_topk', 'cooldown_epochs', 'crop_border_pixels', 'decay_milestones',
        'log_grad_norm', 'max_bad_images', 'mixup_off_epoch', 'num_classes', 'patience_epochs', 'probe_interval',
        'recovery_interval', 'start_epoch', 'tta', 'warmup_epochs', 'workers'),
    _FINITE: ('head_init_bias', 'head_init_scale'),
    _POSITIVE: (
        'bce_pos_weight', 'bn_eps', 'clip_grad', 'decay_epochs', 'decay_rate', 'kd_lr_mult', 'kd_temperature',
        'lr_base', 'lr_cycle_mul', 'lr_k_decay', 'lr_noise_std', 'lr_stable_timescale', 'ratio',
        'train_size_schedule_spread'),
    NOT_NEGATIVE: (
        'asl_gamma_neg', 'asl_gamma_pos', 'aug_repeats', 'color_jitter', 'cutmix', 'distill_loss_weight',
        'epoch_repeats', 'loss_weight_power', 'lr', 'lr_cycle_decay', 'min_lr', 'mixup', 'naflex_patch_size_probs',
        'opt_eps', 'poly_gamma', 'scale', 'task_loss_weight', 'train_size_probs', 'warmup_lr', 'weight_decay'),
    _PROBABILITY: (
        'color_jitter_prob', 'cutmix_minmax', 'gaussian_blur_prob', 'grayscale_prob', 'hflip', 'layer_decay_min_scale',
        'layer_decay_no_opt_scale', 'lr_noise', 'mixup_prob', 'mixup_switch_prob', 'multilabel_threshold', 'reprob',
        'teacher_drop', 'train_size_random_mix', 'vflip',
        'mean', 'teacher_mean'),  # pixels are 0 to 1
    _PART: (
        'bn_momentum',  # that of torch: the part of the new statistics
        'layer_decay', 'lr_noise_pct',
        'std', 'teacher_std'),
    _BELOW_ONE: (
        'asl_clip', 'bce_target_thresh', 'dot_delta', 'drop', 'drop_block', 'drop_connect', 'drop_path',
        'model_ema_decay', 'momentum', 'opt_betas', 'smoothing'),
    Range(-1): ('poly_epsilon',),  # from where on the loss falls with the probability
    Range(-1, LARGEST_SIZE): ('local_rank',),  # of launchers that start one process
    # images 100 times as large as the crop, or a tenth of it
    Range(0.01, 10): ('crop_pct',),
    # NumPy's seeds are below 2 ** 32, and every process adds its rank
    Range(0, 2 ** 32 - 2 ** 16): ('seed',),
}
_HINTS = {
    'clip_grad': 'leave it out for no clipping',
    'mean': 'pixels are numbers from 0 to 1; divide what is meant for 0 to 255 by 255',
    'std': 'pixels are numbers from 0 to 1; divide what is meant for 0 to 255 by 255',
    'teacher_mean': 'pixels are numbers from 0 to 1; divide what is meant for 0 to 255 by 255',
    'teacher_std': 'pixels are numbers from 0 to 1; divide what is meant for 0 to 255 by 255',
    'model_ema_decay': 'with 1 the average would stay at the initial weights',
}


def range_of(name: str) -> Range:
    """Return the range of a numeric flag, by its name in the parsed arguments.

    Raises:
        KeyError: If it has none.
    """
    return {name: span for span, names in RANGES.items() for name in names}[name]


def check_ranges(args: argparse.Namespace) -> None:
    """Reject numbers outside of their flag's range; of a list, each must be inside.

    Raises:
        UsageError: Names the flag, the value and the range.
    """
    for span, names in RANGES.items():
        for name in names:
            for value in all_values(getattr(args, name, None)):
                values = value if isinstance(value, (list, tuple)) else [value]
                if any(v is not None and v not in span for v in values):
                    hint = f' ({_HINTS[name]})' if name in _HINTS else ''
                    raise UsageError(f'--{name.replace("_", "-")} {_text(value)} must be {span}{hint}')


def _text(value: Any) -> str:
    return ' '.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
