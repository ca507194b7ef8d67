"""Command lines of the training and the validation script; the only file that knows argparse.

Flags of timm's `train.py` and `validate.py` keep timm's names, defaults and meanings; a flag is here only if the
scripts act on it. One `add_xxx_args` function per group: a new flag is one more line in one of them. Nothing here
builds a model or reads data, so only what the flags alone can show to be wrong is checked here.
"""
import argparse
import difflib
import logging
import math
from typing import Any, Dict, NoReturn, Optional, Sequence, Tuple

import yaml
from timm.optim import list_optimizers
from timm.utils import ParseKwargs

from .errors import UsageError

_logger = logging.getLogger(__name__)

_INTERPOLATIONS = ('bilinear', 'bicubic', 'nearest', 'box', 'hamming', 'lanczos')
_SCHEDULES = ('cosine', 'tanh', 'step', 'constant', 'multistep', 'plateau', 'poly', 'wsd', 'rsqrt', 'none')
_AUTO_AUGMENT = ('rand', 'augmix', 'original', 'originalr', 'v0', 'v0r', '3a')

# Flags with a fixed set of values that timm's parser leaves open, so that a typo shows up late or not at all.
_ONE_OF: Dict[str, Tuple[Optional[str], ...]] = {
    'amp_dtype': ('float16', 'bfloat16'),
    'model_dtype': (None, '', 'float32', 'float16', 'bfloat16'),
    'clip_mode': ('norm', 'value', 'agc'),
    'sched': _SCHEDULES,
    'lr_base_scale': ('', 'linear', 'sqrt'),
    'train_crop_mode': (None, '', 'rrc', 'rkrc', 'rkrr'),
    'crop_mode': (None, '', 'center', 'squash', 'border'),
    'remode': ('pixel', 'rand', 'const'),
    'mixup_mode': ('batch', 'pair', 'elem'),
    'interpolation': ('', *_INTERPOLATIONS),
    'train_interpolation': ('', 'random', *_INTERPOLATIONS),
    'dist_bn': ('', 'broadcast', 'reduce'),
    'worker_seeding': ('all', 'part'),
    'eval_metric': ('top1', 'top5', 'loss'),
    'results_format': ('csv', 'json'),
}
_AT_LEAST_ONE = (
    'batch_size', 'validation_batch_size', 'epochs', 'grad_accum_steps', 'num_classes', 'img_size', 'in_chans',
    'log_interval', 'log_freq', 'val_interval', 'checkpoint_hist', 'recount',
)
_NOT_NEGATIVE = (
    'mixup', 'cutmix', 'workers', 'weight_decay', 'lr', 'lr_base', 'warmup_lr', 'min_lr', 'warmup_epochs',
    'cooldown_epochs', 'recovery_interval', 'mixup_off_epoch', 'start_epoch', 'aug_repeats', 'epoch_repeats', 'tta',
    'distill_loss_weight', 'task_loss_weight',
)
_PROBABILITIES = (
    'hflip', 'vflip', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob', 'reprob', 'mixup_prob',
    'mixup_switch_prob', 'smoothing', 'drop', 'drop_path', 'drop_block', 'model_ema_decay',
)
# Settings that only a distillation run reads, with the value that means 'not given'.
_NEEDS_KD: Dict[str, Any] = {
    'teacher': None,
    'teacher_checkpoint': '',
    'teacher_kwargs': {},
    'task_loss_weight': None,
    'distill_loss_weight': None,
    'kd_tap': 'auto',
}


class ArgumentParser(argparse.ArgumentParser):
    """Parser whose errors are one line: the usage of some 150 flags would bury the message."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: error: {message} (--help lists all flags)\n')


class ParseKeyValues(ParseKwargs):
    """`key=value ...` into a dict as timm does it, but an item that is not `key=value` is named in the error."""

    def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: Any,
            option_string: Optional[str] = None,
    ) -> None:
        for item in values:
            key, sep, _ = item.partition('=')
            if item and not (key.strip() and sep):
                raise argparse.ArgumentError(self, f"'{item}' is not of the form key=value")
        super().__call__(parser, namespace, values, option_string)


def _create_parser(description: str) -> ArgumentParser:
    parser = ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('-c', '--config', metavar='FILE', default=argparse.SUPPRESS,
                        help='YAML file with values for any of these flags; the command line wins over it')
    return parser


def create_train_parser() -> ArgumentParser:
    """Parser of `train_distill.py`."""
    parser = _create_parser('Train a timm model, alone or distilled from a frozen teacher')
    add_distillation_args(parser)
    add_dataset_args(parser)
    add_train_split_args(parser)
    add_model_args(parser)
    add_train_model_args(parser)
    add_device_args(parser)
    add_distributed_args(parser)
    add_optimizer_args(parser)
    add_schedule_args(parser)
    add_augmentation_args(parser)
    add_mixup_args(parser)
    add_regularization_args(parser)
    add_batch_norm_args(parser)
    add_ema_args(parser)
    add_loader_args(parser)
    add_output_args(parser)
    return parser


def create_validate_parser() -> ArgumentParser:
    """Parser of `validate.py`, for one checkpoint."""
    parser = _create_parser('Evaluate one timm model or checkpoint on a labelled image set')
    add_dataset_args(parser)
    add_model_args(parser, model_flags=('--model', '-m'), model_default='dpn92', batch_size=256)
    add_device_args(parser)
    add_loader_args(parser)
    add_validate_args(parser)
    return parser


def add_distillation_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Distillation')
    group.add_argument('--teacher', metavar='NAME', default=None,
                       help='teacher: a timm model name, hf-hub:org/name or local-dir:/path')
    group.add_argument('--teacher-checkpoint', metavar='FILE', default='',
                       help='teacher weights (.safetensors, .pth or a training checkpoint) instead of pretrained ones')
    group.add_argument('--teacher-kwargs', nargs='*', default={}, action=ParseKeyValues, metavar='KEY=VALUE',
                       help='extra arguments for the teacher\'s constructor, e.g. img_size=256')
    group.add_argument('--teacher-pretrained', action=argparse.BooleanOptionalAction, default=True,
                       help='start the teacher from its pretrained weights; without them it teaches noise')
    group.add_argument('--teacher-eval', action=argparse.BooleanOptionalAction, default=None,
                       help='report the teacher\'s accuracy before training; None: when there is validation data')
    group.add_argument('--kd', default='none', metavar='NAME[+NAME...]',
                       help='distillation methods, joined by +, e.g. norm or norm+kd; none trains the student alone')
    group.add_argument('--kd-weight', nargs='*', default={}, action=ParseKeyValues, metavar='NAME=W',
                       help='weight of each method\'s loss, e.g. norm=1 kd=0.5; the method\'s own default if absent')
    group.add_argument('--kd-kwargs', nargs='*', default={}, action=ParseKeyValues, metavar='NAME.KEY=VALUE',
                       help='method options, e.g. norm.segments=8 kd.temperature=4; --list-kd shows them all')
    group.add_argument('--kd-tap', default='auto', choices=['auto', 'features', 'pre_logits', 'side'],
                       help='where features are matched: the last feature map, the classifier\'s input, or the first '
                            'of the two from which the adapter can be merged away (auto)')
    group.add_argument('--task-loss-weight', type=float, default=None,
                       help='factor on the label loss; given alone, the distillation losses get 1 minus it; None: 1')
    group.add_argument('--distill-loss-weight', type=float, default=None,
                       help='factor on the sum of all distillation losses; None: 1')
    group.add_argument('--list-kd', action='store_true', default=False,
                       help='print the distillation methods with their options and papers, then exit')
    group.add_argument('--dry-run', action='store_true', default=False,
                       help='check the pair without data and weights: tap, shapes, cost, merge error; exit code 2 if '
                            'it does not work')
    group.add_argument('--demo', action='store_true', default=False,
                       help='short complete run on handwritten digits; needs no data, no network and no other flag')
    group.add_argument('--demo-dir', metavar='DIR', default='./output/demo', help='where --demo writes')


def add_dataset_args(parser: argparse.ArgumentParser) -> None:
    # A positional has to be added to the parser itself, a group would list it twice.
    parser.add_argument('data', nargs='?', metavar='DIR', help='dataset folder (older form of --data-dir)')
    group = parser.add_argument_group('Dataset')
    group.add_argument('--data-dir', metavar='DIR',
                       help='dataset folder with one sub-folder per split and, in these, one per class')
    group.add_argument('--dataset', metavar='NAME', default='',
                       help='reader and dataset name such as hfds/NAME, wds/NAME, tfds/NAME or torch/NAME; '
                            'empty: class folders or tar files')
    group.add_argument('--dataset-download', action='store_true', default=False,
                       help='let torch/ and tfds/ datasets download what is missing')
    group.add_argument('--class-map', type=str, default='', metavar='FILENAME',
                       help='text file with one class folder name per line, in label order')
    group.add_argument('--input-img-mode', type=str, default=None,
                       help='PIL mode that images are converted to; None: RGB for 3 channels, else L')
    group.add_argument('--input-key', type=str, default=None, help='name of the image column or field')
    group.add_argument('--target-key', type=str, default=None, help='name of the label column or field')
    group.add_argument('--dataset-trust-remote-code', action='store_true', default=False,
                       help='let a Hugging Face dataset run the Python code that comes with it')


def add_train_split_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Splits')
    group.add_argument('--train-split', metavar='NAME', default='train', help='split to train on')
    group.add_argument('--val-split', metavar='NAME', default='validation',
                       help='split to validate on; an empty string trains without validation')
    group.add_argument('--train-num-samples', type=int, default=None, metavar='N',
                       help='size of the training split, for streamed datasets that do not know it')
    group.add_argument('--val-num-samples', type=int, default=None, metavar='N',
                       help='size of the validation split, for streamed datasets that do not know it')


def add_model_args(
        parser: argparse.ArgumentParser,
        model_flags: Sequence[str] = ('--model', '--student'),
        model_default: str = 'resnet50',
        batch_size: int = 128,
) -> None:
    """What both scripts need to build a model and to shape its input."""
    group = parser.add_argument_group('Model')
    group.add_argument(*model_flags, dest='model', type=str, default=model_default, metavar='NAME',
                       help='timm model to train (the student) or to evaluate')
    group.add_argument('--pretrained', action='store_true', default=False, help='start from pretrained weights')
    group.add_argument('--num-classes', type=int, default=None, metavar='N',
                       help='number of classes; None: as many as the model has')
    group.add_argument('--gp', type=str, default=None, metavar='POOL',
                       help='global pooling: fast, avg, max, avgmax or avgmaxc; None: the model\'s own')
    group.add_argument('--img-size', type=int, default=None, metavar='N',
                       help='height and width of the input; None: the model\'s own')
    group.add_argument('--in-chans', type=int, default=None, metavar='N', help='input channels; None: 3')
    group.add_argument('--input-size', type=int, nargs=3, default=None, metavar='N',
                       help='channels, height and width of the input, e.g. 3 224 224; wins over --img-size')
    group.add_argument('--crop-pct', type=float, default=None, metavar='N',
                       help='part of the resized image that the validation crop keeps')
    group.add_argument('--mean', type=float, nargs='+', default=None, metavar='MEAN',
                       help='pixel mean to subtract, in 0 to 1; one value or one per channel')
    group.add_argument('--std', type=float, nargs='+', default=None, metavar='STD',
                       help='pixel deviation to divide by; one value or one per channel')
    group.add_argument('--interpolation', type=str, default='', metavar='NAME',
                       help='resize filter for validation; empty: the model\'s own')
    group.add_argument('-b', '--batch-size', type=int, default=batch_size, metavar='N',
                       help='images per step and device')
    group.add_argument('--channels-last', action='store_true', default=False,
                       help='keep tensors in channels-last memory order')
    group.add_argument('--fast-norm', action='store_true', default=False,
                       help='compute normalisation layers in low precision under AMP (experimental)')
    group.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKeyValues, metavar='KEY=VALUE',
                       help='extra arguments for the model\'s constructor')
    group.add_argument('--torchcompile', type=str, nargs='?', default=None, const='inductor', metavar='BACKEND',
                       help='compile the model; without a value the backend is inductor')
    group.add_argument('--torchcompile-mode', type=str, default=None, metavar='MODE',
                       help='mode passed to torch.compile')


def add_train_model_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Model, training only')
    group.add_argument('--pretrained-path', type=str, default=None, metavar='PATH',
                       help='file to use in place of the published pretrained weights; the head is adapted')
    group.add_argument('--initial-checkpoint', type=str, default='', metavar='PATH',
                       help='weights to load into the newly built model')
    group.add_argument('--resume', type=str, default='', metavar='PATH',
                       help='training checkpoint to go on from: weights, adapter, optimizer, position')
    group.add_argument('--no-resume-opt', action='store_true', default=False,
                       help='with --resume: leave out the optimizer\'s state')
    group.add_argument('-vb', '--validation-batch-size', type=int, default=None, metavar='N',
                       help='batch size of the validation; None: --batch-size')
    group.add_argument('--grad-accum-steps', type=int, default=1, metavar='N',
                       help='batches whose gradients are added before one optimizer step')
    group.add_argument('--grad-checkpointing', action='store_true', default=False,
                       help='save memory by recomputing the student\'s activations in the backward pass')
    group.add_argument('--head-init-scale', type=float, default=None,
                       help='multiply the new classifier\'s weight and bias by this')
    group.add_argument('--head-init-bias', type=float, default=None, help='set the new classifier\'s bias to this')


def add_device_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Device')
    group.add_argument('--device', type=str, default=None,
                       help='torch device; None: cuda where there is one, the CPU otherwise')
    group.add_argument('--amp', action='store_true', default=False, help='mixed precision by autocast')
    group.add_argument('--amp-dtype', type=str, default='float16', help='lower precision: float16 or bfloat16')
    group.add_argument('--model-dtype', type=str, default=None,
                       help='dtype of model and input without --amp: float32, float16 or bfloat16')


def add_distributed_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Distributed training')
    group.add_argument('--no-ddp-bb', action='store_true', default=False,
                       help='do not broadcast buffers at every step')
    group.add_argument('--local_rank', '--local-rank', type=int, default=0,
                       help='set by older launchers; torchrun uses the environment')


def add_optimizer_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Optimizer')
    group.add_argument('--opt', type=str, default='sgd', metavar='OPTIMIZER', help='name of a timm optimizer')
    group.add_argument('--opt-eps', type=float, default=None, metavar='EPSILON', help='None: the optimizer\'s own')
    group.add_argument('--opt-betas', type=float, nargs='+', default=None, metavar='BETA',
                       help='None: the optimizer\'s own')
    group.add_argument('--momentum', type=float, default=0.9, metavar='M', help='momentum')
    group.add_argument('--weight-decay', type=float, default=2e-5, help='weight decay')
    group.add_argument('--clip-grad', type=float, default=None, metavar='NORM',
                       help='limit for the gradients; None: no clipping')
    group.add_argument('--clip-mode', type=str, default='norm', help='what the limit is on: norm, value or agc')
    group.add_argument('--layer-decay', type=float, default=None,
                       help='learning rate factor from each layer to the one before it')
    group.add_argument('--layer-decay-min-scale', type=float, default=0,
                       help='smallest factor that --layer-decay may give')
    group.add_argument('--layer-decay-no-opt-scale', type=float, default=None,
                       help='layers whose factor falls below this are frozen')
    group.add_argument('--opt-kwargs', nargs='*', default={}, action=ParseKeyValues, metavar='KEY=VALUE',
                       help='extra arguments for the optimizer')


def add_schedule_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Learning rate and schedule')
    group.add_argument('--epochs', type=int, default=300, metavar='N', help='epochs to train')
    group.add_argument('--start-epoch', type=int, default=None, metavar='N',
                       help='first epoch; None: 0, or where --resume stopped')
    group.add_argument('--epoch-repeats', type=float, default=0., metavar='N',
                       help='passes over a streamed dataset that count as one epoch')
    group.add_argument('--lr', type=float, default=None, metavar='LR',
                       help='learning rate; None: computed from --lr-base')
    group.add_argument('--lr-base', type=float, default=0.1, metavar='LR',
                       help='learning rate for a global batch of --lr-base-size images, scaled to the actual one')
    group.add_argument('--lr-base-size', type=int, default=256, metavar='DIV', help='batch size --lr-base is for')
    group.add_argument('--lr-base-scale', type=str, default='', metavar='SCALE',
                       help='how --lr-base grows with the batch: linear or sqrt; empty: by optimizer')
    group.add_argument('--sched', type=str, default='cosine', metavar='SCHEDULER',
                       help=f'one of {", ".join(_SCHEDULES)}')
    group.add_argument('--sched-on-updates', action='store_true', default=False,
                       help='move the schedule at every update, not once per epoch')
    group.add_argument('--warmup-lr', type=float, default=1e-5, metavar='LR', help='learning rate warmup starts at')
    group.add_argument('--warmup-epochs', type=int, default=5, metavar='N', help='length of the warmup')
    group.add_argument('--warmup-prefix', action='store_true', default=False,
                       help='put the warmup before the schedule, which makes the run longer')
    group.add_argument('--cooldown-epochs', type=int, default=0, metavar='N',
                       help='epochs at --min-lr after the schedule')
    group.add_argument('--min-lr', type=float, default=0, metavar='LR', help='lowest learning rate of the schedule')
    group.add_argument('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], metavar='EPOCH',
                       help='multistep: increasing epochs at which the rate falls')
    group.add_argument('--decay-epochs', type=float, default=90, metavar='N', help='step: epochs between two falls')
    group.add_argument('--decay-rate', '--dr', type=float, default=0.1, metavar='RATE', help='factor of each fall')
    group.add_argument('--patience-epochs', type=int, default=10, metavar='N',
                       help='plateau: epochs without progress before a fall')
    group.add_argument('--lr-cycle-mul', type=float, default=1.0, metavar='MULT',
                       help='length of each cycle relative to the one before')
    group.add_argument('--lr-cycle-decay', type=float, default=0.5, metavar='MULT',
                       help='peak of each cycle relative to the one before')
    group.add_argument('--lr-cycle-limit', type=int, default=1, metavar='N', help='number of cycles')
    group.add_argument('--lr-k-decay', type=float, default=1.0, help='exponent k of k-decay, for cosine and poly')
    group.add_argument('--lr-noise', type=float, nargs='+', default=None, metavar='PCT',
                       help='where noise on the rate starts and stops, as parts of the run')
    group.add_argument('--lr-noise-pct', type=float, default=0.67, metavar='PERCENT', help='largest relative noise')
    group.add_argument('--lr-noise-std', type=float, default=1.0, metavar='STDDEV', help='deviation of the noise')


def add_augmentation_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Augmentation')
    group.add_argument('--no-aug', action='store_true', default=False,
                       help='train on plain resized crops; wins over all other augmentation flags')
    group.add_argument('--train-crop-mode', type=str, default=None,
                       help='rrc (random resized crop), rkrc or rkrr (keep the ratio, then crop); None: rrc')
    group.add_argument('--scale', type=float, nargs='+', default=[0.08, 1.0], metavar='PCT',
                       help='smallest and largest part of the image that a training crop covers')
    group.add_argument('--ratio', type=float, nargs='+', default=[3. / 4., 4. / 3.], metavar='RATIO',
                       help='smallest and largest aspect ratio of a training crop')
    group.add_argument('--hflip', type=float, default=0.5, help='probability of a horizontal flip')
    group.add_argument('--vflip', type=float, default=0., help='probability of a vertical flip')
    group.add_argument('--color-jitter', type=float, default=0.4, metavar='PCT',
                       help='strength of brightness, contrast and saturation changes')
    group.add_argument('--color-jitter-prob', type=float, default=None, metavar='PCT',
                       help='probability of colour jitter; None: always')
    group.add_argument('--grayscale-prob', type=float, default=None, metavar='PCT',
                       help='probability of dropping all colour')
    group.add_argument('--gaussian-blur-prob', type=float, default=None, metavar='PCT', help='probability of a blur')
    group.add_argument('--aa', type=str, default=None, metavar='NAME',
                       help='augmentation policy, e.g. rand-m9-mstd0.5-inc1, augmix-m5-w4, v0 or original')
    group.add_argument('--aug-repeats', type=float, default=0,
                       help='copies of each image per epoch over all processes; distributed training only')
    group.add_argument('--reprob', type=float, default=0., metavar='PCT', help='probability of random erasing')
    group.add_argument('--remode', type=str, default='pixel', help='what erased pixels become: pixel, rand or const')
    group.add_argument('--recount', type=int, default=1, help='largest number of erased boxes')
    group.add_argument('--train-interpolation', type=str, default='random',
                       help=f'resize filter for training: random or one of {", ".join(_INTERPOLATIONS)}')


def add_mixup_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Mixup and cutmix')
    group.add_argument('--mixup', type=float, default=0.0, help='mixup alpha; 0 is off')
    group.add_argument('--cutmix', type=float, default=0.0, help='cutmix alpha; 0 is off')
    group.add_argument('--cutmix-minmax', type=float, nargs='+', default=None,
                       help='smallest and largest cutmix box; turns cutmix on and replaces its alpha')
    group.add_argument('--mixup-prob', type=float, default=1.0, help='probability of mixing at all')
    group.add_argument('--mixup-switch-prob', type=float, default=0.5,
                       help='probability of cutmix rather than mixup where both are on')
    group.add_argument('--mixup-mode', type=str, default='batch',
                       help='what shares one mixing factor: batch, pair or elem')
    group.add_argument('--mixup-off-epoch', type=int, default=0, metavar='N',
                       help='epoch from which images are no longer mixed; 0: never')


def add_regularization_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Regularisation and label loss')
    group.add_argument('--smoothing', type=float, default=0.1, help='label smoothing')
    group.add_argument('--drop', type=float, default=0.0, metavar='PCT', help='dropout rate')
    group.add_argument('--drop-path', type=float, default=None, metavar='PCT', help='stochastic depth rate')
    group.add_argument('--drop-block', type=float, default=None, metavar='PCT', help='drop-block rate')
    group.add_argument('--bce-loss', action='store_true', default=False,
                       help='binary cross entropy per class in place of cross entropy')
    group.add_argument('--bce-sum', action='store_true', default=False,
                       help='with --bce-loss: add the classes up, not average them')
    group.add_argument('--bce-target-thresh', type=float, default=None,
                       help='with --bce-loss: soft targets above this become 1, all others 0')
    group.add_argument('--bce-pos-weight', type=float, default=None,
                       help='with --bce-loss: weight of the positive term')


def add_batch_norm_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Batch norm')
    group.add_argument('--bn-momentum', type=float, default=None, help='for models whose constructor takes it')
    group.add_argument('--bn-eps', type=float, default=None, help='for models whose constructor takes it')
    group.add_argument('--sync-bn', action='store_true', default=False,
                       help='batch statistics over all processes')
    group.add_argument('--dist-bn', type=str, default='reduce',
                       help='running statistics after each epoch: reduce (average), broadcast or empty')


def add_ema_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Moving average of the weights')
    group.add_argument('--model-ema', action='store_true', default=False,
                       help='keep, validate and save an exponential moving average of the student')
    group.add_argument('--model-ema-force-cpu', action='store_true', default=False,
                       help='keep the average on the CPU; it is then not validated')
    group.add_argument('--model-ema-decay', type=float, default=0.9998, help='decay per update')
    group.add_argument('--model-ema-warmup', action='store_true', default=False,
                       help='let the decay rise to its value from the start of training')


def add_loader_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Loading')
    group.add_argument('--seed', type=int, default=42, metavar='S', help='random seed')
    group.add_argument('-j', '--workers', type=int, default=4, metavar='N', help='loader processes')
    group.add_argument('--pin-mem', action='store_true', default=False, help='load into pinned memory')
    group.add_argument('--no-prefetcher', action='store_true', default=False,
                       help='normalise, erase and mix one step at a time, without timm\'s prefetcher')


def add_output_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Output and logging')
    group.add_argument('--output', type=str, default='', metavar='PATH',
                       help='parent folder of the runs; empty: ./output/train')
    group.add_argument('--experiment', type=str, default='', metavar='NAME',
                       help='folder name of this run; empty: time, model and size')
    group.add_argument('--eval-metric', type=str, default='top1', metavar='NAME',
                       help='what makes a checkpoint the best one: top1, top5 or loss')
    group.add_argument('--checkpoint-hist', type=int, default=10, metavar='N', help='checkpoints to keep')
    group.add_argument('--recovery-interval', type=int, default=0, metavar='N',
                       help='updates between two recovery checkpoints inside an epoch; 0: none')
    group.add_argument('--val-interval', type=int, default=1, metavar='N',
                       help='epochs between two validations, each followed by a checkpoint')
    group.add_argument('--log-interval', type=int, default=50, metavar='N', help='updates between two log lines')
    group.add_argument('--tta', type=int, default=0, metavar='N',
                       help='average the outputs of N consecutive inputs in validation; 0: off')
    group.add_argument('--worker-seeding', type=str, default='all',
                       help='generators seeded in loader processes: all, or part (not NumPy\'s)')
    group.add_argument('--use-multi-epochs-loader', action='store_true', default=False,
                       help='keep loader processes over epochs: faster, but a resumed run sees other augmentations')


def add_validate_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Validation')
    group.add_argument('--checkpoint', type=str, default='', metavar='PATH', help='weights to evaluate')
    group.add_argument('--use-ema', action='store_true', default=False,
                       help='evaluate the checkpoint\'s moving average where it has one')
    group.add_argument('--split', metavar='NAME', default='validation', help='split to evaluate on')
    group.add_argument('--num-samples', type=int, default=None, metavar='N',
                       help='size of the split, for streamed datasets that do not know it')
    group.add_argument('--use-train-size', action='store_true', default=False,
                       help='evaluate at the training size where the model also has a test size')
    group.add_argument('--crop-mode', type=str, default=None, metavar='NAME',
                       help='center, squash or border; None: the model\'s own')
    group.add_argument('--test-pool', action='store_true', default=False,
                       help='at sizes above the model\'s own, pool the predictions of all positions')
    group.add_argument('--log-freq', type=int, default=10, metavar='N', help='batches between two log lines')
    group.add_argument('--results-file', type=str, default='', metavar='FILENAME', help='file for the results')
    group.add_argument('--results-format', type=str, default='csv', help='format of --results-file: csv or json')


def parse_args(parser: argparse.ArgumentParser, argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse a command line; a `--config` file replaces the parser's defaults first.

    Args:
        parser: A newly created parser; its defaults are changed where there is a config file.
        argv: Arguments without the program's name, `sys.argv[1:]` if None.
    """
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f'unrecognized arguments: {" ".join(unknown)}')
    if hasattr(args, 'config'):
        parser.set_defaults(**_read_config(parser, args.config))
        args = parser.parse_args(argv)
        del args.config
    return args


def args_to_yaml(args: argparse.Namespace) -> str:
    """YAML text that `--config` reads back to the same arguments. Call it before anything is added to `args`."""
    return yaml.safe_dump(vars(args), default_flow_style=False)


def _read_config(parser: argparse.ArgumentParser, path: str) -> Dict[str, Any]:
    """Values of a YAML file by argument name, each checked against its flag."""
    try:
        with open(path, encoding='utf-8') as f:
            config = yaml.safe_load(f)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f'cannot read --config {path}: {" ".join(str(error).split())}')
    if not isinstance(config, dict):
        parser.error(f'--config {path} must hold lines of the form name: value')
    actions = _config_actions(parser)
    unknown = [str(key) for key in config if key not in actions]
    if unknown:
        parser.error(f'unknown keys in --config {path}: {", ".join(_with_closest(k, actions) for k in unknown)}')
    return {actions[key].dest: _config_value(parser, actions[key], key, value) for key, value in config.items()}


def _config_actions(parser: argparse.ArgumentParser) -> Dict[str, argparse.Action]:
    """Every key that a config file may hold: each argument's name, and its other long flags (`student`)."""
    actions: Dict[str, argparse.Action] = {}
    for action in parser._actions:  # argparse has no public list
        if action.dest in ('help', 'config'):
            continue
        if action.nargs != 0:  # the second flag of a switch is its opposite
            actions.update({o[2:].replace('-', '_'): action for o in action.option_strings if o.startswith('--')})
        actions[action.dest] = action
    return actions


def _with_closest(key: str, valid: Dict[str, argparse.Action]) -> str:
    closest = difflib.get_close_matches(key.replace('-', '_'), list(valid), n=3)
    return f"'{key}' (closest: {', '.join(closest)})" if closest else f"'{key}'"


def _config_value(parser: argparse.ArgumentParser, action: argparse.Action, key: str, value: Any) -> Any:
    """Check and convert one value of a config file, which argparse does only for text."""
    if value is None and action.default is None:
        return None
    if action.nargs == 0:
        valid, words = isinstance(value, bool), 'true or false'
    elif isinstance(action, ParseKwargs):
        valid, words = isinstance(value, dict), 'a mapping'
    elif action.nargs == '+' or isinstance(action.nargs, int):
        length = action.nargs if isinstance(action.nargs, int) else None
        valid, words = isinstance(value, list) and length in (None, len(value)), f'a list of {length or "some"} values'
        if valid:
            return [_config_scalar(parser, action, key, item) for item in value]
    else:
        return _config_scalar(parser, action, key, value)
    if not valid:
        parser.error(f'--config: {key} must be {words}, got {value!r}')
    return value


def _config_scalar(parser: argparse.ArgumentParser, action: argparse.Action, key: str, value: Any) -> Any:
    kind: Any = action.type or str
    valid = isinstance(value, (int, float, str)) and not isinstance(value, bool)
    if valid:
        try:
            converted = kind(value)  # text too: YAML reads 1e-5, for want of a point, as text
            valid = kind is not int or isinstance(value, str) or converted == value
        except (ValueError, OverflowError):
            valid = False
    if not valid:
        words = {int: 'a whole number', float: 'a number'}.get(kind, 'text')
        parser.error(f'--config: {key} must be {words}, got {value!r}')
    if action.choices is not None and converted not in action.choices:
        parser.error(f'--config: {key} must be one of {", ".join(map(str, action.choices))}, got {value!r}')
    return converted


def check_train_args(args: argparse.Namespace) -> None:
    """Reject values and combinations that cannot work, warn of those that have no effect.

    Raises:
        UsageError: Names the value, what is allowed and the flag.
    """
    _check_values(args)
    _check_optimizer(args)
    _check_augmentation(args)
    _check_distillation(args)
    if args.no_resume_opt and not args.resume:
        _logger.warning('--no-resume-opt has no effect without --resume.')
    if args.torchcompile_mode and not args.torchcompile:
        _logger.warning('--torchcompile-mode has no effect without --torchcompile.')


def check_validate_args(args: argparse.Namespace) -> None:
    """As `check_train_args`, for the validation script."""
    _check_values(args)


def _flag(name: str) -> str:
    return '--' + name.replace('_', '-')


def _check_values(args: argparse.Namespace) -> None:
    """Checks on single values and on the precision, for whichever flags this script has."""
    for name, allowed in _ONE_OF.items():
        if getattr(args, name, allowed[0]) not in allowed:
            words = ', '.join(f"'{v}'" for v in allowed if v)
            raise UsageError(f"{_flag(name)} '{getattr(args, name)}' must be one of {words}")
    for names, low, high in ((_AT_LEAST_ONE, 1, math.inf), (_NOT_NEGATIVE, 0, math.inf), (_PROBABILITIES, 0, 1)):
        for name in names:
            value = getattr(args, name, None)
            if value is not None and not low <= value <= high:
                raise UsageError(
                    f'{_flag(name)} {value} must be ' + (f'{low} or more' if high == math.inf else 'between 0 and 1'))
    if args.amp and args.model_dtype not in (None, '', 'float32'):
        raise UsageError(f'--model-dtype {args.model_dtype} does not go with --amp, which needs float32 weights: '
                         'leave out one of the two')
    channels = args.input_size[0] if args.input_size else args.in_chans or 3
    for name in ('mean', 'std'):
        value = getattr(args, name)
        if value is not None and len(value) not in (1, channels):
            raise UsageError(f'{_flag(name)} has {len(value)} values: give one, or one for each of {channels} channels')


def _check_optimizer(args: argparse.Namespace) -> None:
    names = [str(name) for name in list_optimizers()]
    opt = args.opt.lower().split('_')[-1]  # timm takes prefixes such as lookahead_
    if opt not in names:
        closest = ', '.join(difflib.get_close_matches(opt, names) or names)
        raise UsageError(f"--opt '{args.opt}' is not an optimizer of timm; closest: {closest}")


def _check_augmentation(args: argparse.Namespace) -> None:
    if args.aa and args.aa.split('-')[0] not in _AUTO_AUGMENT:
        raise UsageError(f"--aa '{args.aa}' must begin with one of {', '.join(_AUTO_AUGMENT)}")
    for name in ('scale', 'ratio', 'cutmix_minmax'):
        value = getattr(args, name)
        if value is not None and (len(value) != 2 or not 0 <= value[0] <= value[1]):
            raise UsageError(f'{_flag(name)} {" ".join(map(str, value))} must be two numbers, smallest first')
    if (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None) and args.batch_size % 2:
        raise UsageError(f'--batch-size {args.batch_size} must be even with --mixup or --cutmix, which mix in pairs')
    if not args.bce_loss and (args.bce_sum or args.bce_target_thresh is not None or args.bce_pos_weight is not None):
        raise UsageError('--bce-sum, --bce-target-thresh and --bce-pos-weight need --bce-loss')


def _check_distillation(args: argparse.Namespace) -> None:
    """Check what needs no list of methods; the task checks names, weights and options."""
    if args.kd != 'none' and not args.teacher:
        raise UsageError(f'--kd {args.kd} needs a teacher: pass --teacher NAME, or --kd none to train without one')
    if args.kd == 'none':
        ignored = [_flag(name) for name, unset in _NEEDS_KD.items() if getattr(args, name) != unset]
        if ignored:
            _logger.warning(f'{", ".join(ignored)} ignored: --kd none trains the student alone.')
