"""Flags of the model, of where it runs, and in which precision."""
from typing import Sequence

from .parser import ArgumentParser, ParseKeyValues


def add_model_args(
        parser: ArgumentParser,
        model_flags: Sequence[str] = ('--model', '--student'),
        model_default: str = 'resnet50',
        batch_size: int = 128,
        aot_autograd: bool = False,
) -> None:
    """What both scripts need to build a model and to shape its input."""
    group = parser.add_topic('model', 'Model')
    group.add_argument(
        *model_flags, dest='model', type=str, default=model_default, metavar='NAME',
        help='timm model to train (the student) or to evaluate')
    group.add_argument('--pretrained', action='store_true', default=False, help='start from pretrained weights')
    group.add_argument(
        '--num-classes', type=int, default=None, metavar='N',
        help='number of classes; 0: no classifier, the student is an encoder; None: as many as the model has, without '
             'labels 0 where no method of --kd reads logits')
    group.add_argument(
        '--gp', type=str, default=None, metavar='POOL',
        help='global pooling: fast, avg, max, avgmax or avgmaxc; None: the model\'s own')
    group.add_argument(
        '--img-size', type=int, default=None, metavar='N',
        help='height and width of the input; None: the model\'s own')
    group.add_argument('--in-chans', type=int, default=None, metavar='N', help='input channels; None: 3')
    group.add_argument(
        '--input-size', type=int, nargs=3, default=None, metavar='N',
        help='channels, height and width of the input, e.g. 3 224 224; wins over --img-size')
    group.add_argument(
        '--crop-pct', type=float, default=None, metavar='N',
        help='part of the resized image that the validation crop keeps')
    group.add_argument(
        '--mean', type=float, nargs='+', default=None, metavar='MEAN',
        help='pixel mean to subtract, in 0 to 1; one value or one per channel')
    group.add_argument(
        '--std', type=float, nargs='+', default=None, metavar='STD',
        help='pixel deviation to divide by; one value or one per channel')
    group.add_argument(
        '--interpolation', type=str, default='', metavar='NAME',
        help='resize filter for validation; empty: the model\'s own')
    group.add_argument(
        '-b', '--batch-size', type=int, default=batch_size, metavar='N',
        help='images per step and device')
    group.add_argument(
        '--channels-last', action='store_true', default=False,
        help='keep tensors in channels-last memory order')
    group.add_argument(
        '--fast-norm', action='store_true', default=False,
        help='compute normalisation layers in low precision under AMP (experimental)')
    group.add_argument(
        '--model-kwargs', nargs='*', default={}, action=ParseKeyValues, metavar='KEY=VALUE',
        help='extra arguments for the model\'s constructor')
    group.add_argument(
        '--fuser', type=str, default='', metavar='NAME',
        help='TorchScript fuser: te, old or nvfuser; empty: torch\'s own choice')
    group.add_argument(
        '--torchcompile-mode', type=str, default=None, metavar='MODE',
        help='mode passed to torch.compile')
    exclusive = group.add_mutually_exclusive_group()
    exclusive.add_argument(
        '--torchscript', action='store_true', default=False,
        help='turn the model into TorchScript; with train_distill.py only an error that says why')
    exclusive.add_argument(
        '--torchcompile', type=str, nargs='?', default=None, const='inductor', metavar='BACKEND',
        help='compile the model; without a value the backend is inductor')
    if aot_autograd:
        exclusive.add_argument(
            '--aot-autograd', action='store_true', default=False,
            help='fuse operations with functorch\'s memory-efficient fusion')


def add_train_model_args(parser: ArgumentParser) -> None:
    group = parser.add_topic('model', 'Model, training only')
    group.add_argument(
        '--pretrained-path', type=str, default=None, metavar='PATH',
        help='file to use in place of the published pretrained weights; the head is adapted')
    group.add_argument(
        '--initial-checkpoint', type=str, default='', metavar='PATH',
        help='weights to load into the newly built model')
    group.add_argument(
        '--resume', type=str, default='', metavar='PATH',
        help='training checkpoint to go on from exactly; auto: the newest good one of this '
             '--experiment or --output, if there is one')
    group.add_argument(
        '--resume-data-changed', action='store_true', default=False,
        help='with --resume: go on with other images or classes than those that it was trained on')
    group.add_argument(
        '--no-resume-opt', action='store_true', default=False,
        help='with --resume: leave out the optimizer\'s state')
    group.add_argument(
        '-vb', '--validation-batch-size', type=int, default=None, metavar='N',
        help='batch size of the validation; None: --batch-size')
    group.add_argument(
        '--grad-accum-steps', type=int, default=1, metavar='N',
        help='batches whose gradients are added before one optimizer step')
    group.add_argument(
        '--grad-checkpointing', action='store_true', default=False,
        help='save memory by recomputing the student\'s activations in the backward pass')
    group.add_argument(
        '--head-init-scale', type=float, default=None,
        help='multiply the new classifier\'s weight and bias by this')
    group.add_argument('--head-init-bias', type=float, default=None, help='set the new classifier\'s bias to this')


def add_device_args(parser: ArgumentParser) -> None:
    group = parser.add_topic('device', 'Device')
    group.add_argument(
        '--device', type=str, default=None,
        help='torch device; None: cuda where there is one, the CPU otherwise')
    group.add_argument('--amp', action='store_true', default=False, help='mixed precision by autocast')
    group.add_argument('--amp-dtype', type=str, default='float16', help='lower precision: float16 or bfloat16')
    group.add_argument(
        '--model-dtype', type=str, default=None,
        help='dtype of model and input without --amp: float32, float16 or bfloat16')


def add_train_device_args(parser: ArgumentParser) -> None:
    group = parser.add_topic('device', 'Device')
    group.add_argument(
        '--device-modules', type=str, nargs='+', default=None, metavar='MODULE',
        help='Python modules to import first, for devices that come as plug-ins')
    group.add_argument(
        '--synchronize-step', action='store_true', default=False,
        help='wait for the device after every update')


def add_distributed_args(parser: ArgumentParser) -> None:
    group = parser.add_topic('device', 'Distributed training')
    group.add_argument(
        '--no-ddp-bb', action='store_true', default=False,
        help='do not broadcast buffers at every step')
    group.add_argument(
        '--local_rank', '--local-rank', type=int, default=0,
        help='set by older launchers; torchrun uses the environment')
