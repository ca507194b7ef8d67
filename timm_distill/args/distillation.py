"""Flags of the teacher and the distillation methods."""
import argparse
from typing import Any, Mapping, Sequence

from ..errors import UsageError
from .parser import ArgumentParser, ParseKeyValues
from .per_teacher import StorePerTeacher, StoreTeachers, teachers_of

DOT_DELTA = 0.075  # the published one of CIFAR-100


def add_distillation_args(parser: ArgumentParser) -> None:
    group = parser.add_topic('kd', 'Distillation')
    group.add_argument(
        '--teacher', metavar='NAME', default=None, action=StoreTeachers,
        help='teacher: a timm model name, hf-hub:org/name, local-dir:/path, torchvision:name or '
             'FILE.py:function; several with names, e.g. dino=vit_small_patch16_dinov3 sup=resnet50. The flags of the '
             'teacher then take one value for all, or NAME=VALUE for each')
    group.add_argument(
        '--teacher-checkpoint', metavar='FILE', default='', action=StorePerTeacher,
        help='teacher weights (.safetensors, .pth or a training checkpoint) instead of pretrained ones')
    group.add_argument(
        '--teacher-weights', default=None, choices=['raw', 'ema'], action=StorePerTeacher,
        help='which weights of a training checkpoint teach; None: the averaged ones where there are any')
    group.add_argument(
        '--teacher-mean', type=float, default=None, metavar='MEAN', action=StorePerTeacher, many=True,
        help='pixel mean that the teacher was trained with; None: what its weights say of themselves '
             '(a checkpoint\'s flags, a folder\'s config), else its architecture\'s; by name dino=0.5,0.5,0.5')
    group.add_argument(
        '--teacher-std', type=float, default=None, metavar='STD', action=StorePerTeacher, many=True,
        help='pixel deviation that the teacher was trained with, likewise')
    group.add_argument(
        '--teacher-img-size', type=int, default=None, metavar='N', action=StorePerTeacher,
        help='height and width that the teacher is fed; None: what its weights say, else the '
             'student\'s size where the teacher runs at it')
    group.add_argument(
        '--teacher-classes', metavar='auto|FILE', default='', action=StorePerTeacher,
        help='which of the teacher\'s classes are the student\'s, where they differ: by WordNet id or name of the '
             'class (auto), or from a file; its logits are restricted to them')
    group.add_argument(
        '--teacher-standardize', default=None, choices=['none', 'channel', 'phi-s'], action=StorePerTeacher,
        help='bring the features that methods match to mean 0 and deviation 1 over the training images: every channel '
             'by itself, or all by one scale after a rotation (PHI-S); None: channel for the methods that ask for it')
    group.add_argument(
        '--teacher-kwargs', nargs='*', default={}, action=ParseKeyValues, metavar='KEY=VALUE',
        help='extra arguments for the teacher\'s constructor, e.g. img_size=256, of one of several dino.img_size=256')
    group.add_argument(
        '--teacher-pretrained', action=argparse.BooleanOptionalAction, default=True,
        help='start the teacher from its pretrained weights; without them it teaches noise')
    group.add_argument(
        '--teacher-dtype', default=None, choices=['float32', 'bfloat16', 'float16'], action=StorePerTeacher,
        help='precision that the teacher computes in; None: that of the run, --amp included')
    group.add_argument(
        '--teacher-fsdp', action='store_true', default=False,
        help='spread the teacher\'s weights over the processes of a node (fully_shard), for one that '
             'does not fit a device; it is built in host memory first')
    group.add_argument(
        '--teacher-eval', action=argparse.BooleanOptionalAction, default=None,
        help='report the teacher\'s accuracy before training; None: when there is validation data')
    group.add_argument(
        '--kd', default=None, metavar='NAME[+NAME...]',
        help='distillation methods, joined by +, e.g. norm or norm+kd; sdd:kd is one that takes another, kd@sup one '
             'with the teacher of that name alone; none, as without --teacher, trains the student alone')
    group.add_argument(
        '--kd-module', nargs='+', default=[], metavar='FILE',
        help='Python files with methods of your own (classes under @register_method) for --kd')
    group.add_argument(
        '--kd-weight', nargs='*', default={}, action=ParseKeyValues, metavar='NAME=W',
        help='weight of each method\'s loss, e.g. norm=1 kd=0.5; if absent, that of a preset or of the '
             'method\'s published code (--list-kd). kd@sup=0.5 is of one teacher, here and in the two below')
    group.add_argument(
        '--kd-kwargs', nargs='*', default={}, action=ParseKeyValues, metavar='NAME.KEY=VALUE',
        help='method options, e.g. norm.segments=8 kd.temperature=4; --list-kd shows them all')
    group.add_argument(
        '--kd-schedule', nargs='*', default={}, action=ParseKeyValues, metavar='NAME=SCHEDULE',
        help='weight of each method over epochs, times --kd-weight: const, warmup:5 (linear over 5), '
             'cosine:1:0 (from 1 to 0 over the run), decay:30 (held for 30 epochs, then half a cosine '
             'to 0), stop:60 (0 from epoch 60), steps 0:0.1,5:0.5, a product of these '
             '(warmup:5*stop:60) or a name of the method\'s own, e.g. norm=imagenet')
    group.add_argument(
        '--kd-tap', default='auto', choices=['auto', 'features', 'pre_logits', 'side'],
        help='where features are matched: the last feature map, the classifier\'s input, or the first '
             'of the two from which the adapter can be merged away (auto)')
    group.add_argument(
        '--nd-class-means', metavar='FILE', default='', action=StorePerTeacher,
        help='class means of the teacher for nd (.safetensors) in place of a pass over the training set')
    group.add_argument(
        '--nd-class-means-transform', default='eval', choices=['eval', 'train'],
        help='transform of the images in that pass: that of validation, or of training as in the paper')
    group.add_argument(
        '--task-loss-weight', type=float, default=None,
        help='factor on the label loss; None: 1, or that of a preset. The methods keep their weights')
    group.add_argument(
        '--distill-loss-weight', type=float, default=None,
        help='factor on the sum of all distillation losses; None: 1')
    group.add_argument(
        '--teacher-drop', type=float, default=0., metavar='P',
        help='probability with which a batch leaves out one of several teachers; the one with the largest loss stays')
    group.add_argument(
        '--kd-lr-mult', type=float, default=1., metavar='FACTOR',
        help='factor on the learning rate of what distillation adds to the student: adapter and the '
             'methods\' layers')
    group.add_argument(
        '--kd-optimizer', default=None, choices=['dot'],
        help='how gradients of label loss and distillation become one update; dot: with momenta of their own (--opt '
             'sgd, momentum or nesterov), at the cost of a second backward pass; None: their sum')
    group.add_argument(
        '--dot-delta', type=float, default=DOT_DELTA, metavar='D',
        help='with --kd-optimizer dot: momentum + D for the distillation\'s gradient, momentum - D for the label '
             'loss\'s')
    group.add_argument(
        '--log-grad-norm', type=int, default=0, metavar='N',
        help='log each loss term\'s gradient norm on the student, as weighted, at every N-th update of '
             'an epoch, the first included; 0: off. Training is the same with it')
    group.add_argument(
        '--list-kd', action='store_true', default=False,
        help='print the distillation methods with their options and papers, then exit')
    group.add_argument(
        '--dry-run', action='store_true', default=False,
        help='check the pair without data and weights: tap, shapes, cost, merge error; exit code 2 if '
             'it does not work')
    group.add_argument(
        '--demo', action='store_true', default=False,
        help='short complete run on handwritten digits; needs no data, no network and no other flag')
    group.add_argument('--demo-dir', metavar='DIR', default='./output/demo', help='where --demo writes')


def resolve_kd(args: argparse.Namespace, methods: Sequence[str]) -> None:
    """Set `kd` to 'none' where it was not given.

    Args:
        args: Training arguments, changed in place.
        methods: Names of the methods there are, for the message.

    Raises:
        UsageError: If there is a teacher and nothing says what to do with it.
    """
    teachers_of(args.teacher)
    given = [
        f'--{name.replace("_", "-")} {_text(getattr(args, name))}'
        for name in ('teacher', 'teacher_checkpoint', 'teacher_cache')
        if getattr(args, name)]
    if args.kd is None and given:
        raise UsageError(
            f'{" ".join(given)} without --kd: say what is distilled, --kd with one or more of '
            f'{", ".join(methods)} joined by +, or --kd none to train the student alone')
    args.kd = args.kd or 'none'


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ' '.join(f'{name}={item}' for name, item in value.items())
    return value if isinstance(value, str) else ' '.join(value)


def add_timm_distillation_args(parser: ArgumentParser) -> None:
    group = parser.add_topic(
        'timm-kd', 'Distillation with the flags of timm\'s own script',
        'Another way to write --teacher, --kd and --kd-kwargs.')
    group.add_argument('--kd-model-name', type=str, default=None, metavar='NAME', help='the same as --teacher')
    group.add_argument(
        '--kd-distill-type', type=str, default='logit', choices=['logit', 'feature', 'token'],
        help='with --kd-model-name: what is distilled')
    group.add_argument('--kd-loss-type', type=str, default='kl', help='with --kd-model-name: kl is the only one')
    group.add_argument(
        '--kd-temperature', type=float, default=4.0, metavar='T',
        help='with --kd-model-name: temperature of the softened logits')
    group.add_argument(
        '--kd-student-feature-dim', type=int, default=None, metavar='N',
        help='without effect: the width of the student\'s feature is measured')
    group.add_argument(
        '--kd-teacher-feature-dim', type=int, default=None, metavar='N',
        help='without effect: the width of the teacher\'s feature is measured')
    group.add_argument(
        '--kd-token-distill-type', type=str, default='soft', choices=['soft', 'hard'],
        help='with --kd-distill-type token: the teacher\'s distribution or its prediction')
