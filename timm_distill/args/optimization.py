"""Flags of the optimizer, the learning rate, batch norms and the moving average."""
from .checks import SCHEDULES
from .parser import ArgumentParser, ParseKeyValues


def add_optimizer_args(parser: ArgumentParser) -> None:
    group = parser.add_topic('opt', 'Optimizer')
    group.add_argument('--opt', type=str, default='sgd', metavar='OPTIMIZER', help='name of a timm optimizer')
    group.add_argument('--opt-eps', type=float, default=None, metavar='EPSILON', help='None: the optimizer\'s own')
    group.add_argument(
        '--opt-betas', type=float, nargs='+', default=None, metavar='BETA',
        help='None: the optimizer\'s own')
    group.add_argument('--momentum', type=float, default=0.9, metavar='M', help='momentum')
    group.add_argument('--weight-decay', type=float, default=2e-5, help='weight decay')
    group.add_argument(
        '--clip-grad', type=float, default=None, metavar='NORM',
        help='limit for the gradients; None: no clipping')
    group.add_argument('--clip-mode', type=str, default='norm', help='what the limit is on: norm, value or agc')
    group.add_argument(
        '--layer-decay', type=float, default=None,
        help='learning rate factor from each layer to the one before it')
    group.add_argument(
        '--layer-decay-min-scale', type=float, default=0,
        help='smallest factor that --layer-decay may give')
    group.add_argument(
        '--layer-decay-no-opt-scale', type=float, default=None,
        help='layers whose factor falls below this are frozen')
    group.add_argument(
        '--opt-kwargs', nargs='*', default={}, action=ParseKeyValues, metavar='KEY=VALUE',
        help='extra arguments for the optimizer')


def add_schedule_args(parser: ArgumentParser) -> None:
    group = parser.add_topic('lr', 'Learning rate and schedule')
    group.add_argument('--epochs', type=int, default=300, metavar='N', help='epochs to train')
    group.add_argument(
        '--stop-epoch', type=int, default=None, metavar='N',
        help='stop after this many epochs without changing the schedule; --resume goes on')
    group.add_argument(
        '--start-epoch', type=int, default=None, metavar='N',
        help='first epoch; None: 0, or where --resume stopped')
    group.add_argument(
        '--epoch-repeats', type=float, default=0., metavar='N',
        help='passes over a streamed dataset that count as one epoch')
    group.add_argument(
        '--lr', type=float, default=None, metavar='LR',
        help='learning rate; None: computed from --lr-base')
    group.add_argument(
        '--lr-base', type=float, default=0.1, metavar='LR',
        help='learning rate for a global batch of --lr-base-size images, scaled to the actual one')
    group.add_argument('--lr-base-size', type=int, default=256, metavar='DIV', help='batch size --lr-base is for')
    group.add_argument(
        '--lr-base-scale', type=str, default='', metavar='SCALE',
        help='how --lr-base grows with the batch: linear or sqrt; empty: by optimizer')
    group.add_argument(
        '--sched', type=str, default='cosine', metavar='SCHEDULER',
        help=f'one of {", ".join(SCHEDULES)}')
    group.add_argument(
        '--sched-on-updates', action='store_true', default=False,
        help='move the schedule at every update, not once per epoch')
    group.add_argument('--warmup-lr', type=float, default=1e-5, metavar='LR', help='learning rate warmup starts at')
    group.add_argument('--warmup-epochs', type=int, default=5, metavar='N', help='length of the warmup')
    group.add_argument(
        '--warmup-prefix', action='store_true', default=False,
        help='put the warmup before the schedule, which makes the run longer')
    group.add_argument(
        '--cooldown-epochs', type=int, default=0, metavar='N',
        help='epochs at --min-lr after the schedule')
    group.add_argument('--min-lr', type=float, default=0, metavar='LR', help='lowest learning rate of the schedule')
    group.add_argument(
        '--decay-milestones', type=int, nargs='+', default=[90, 180, 270], metavar='EPOCH',
        help='multistep: increasing epochs at which the rate falls')
    group.add_argument('--decay-epochs', type=float, default=90, metavar='N', help='step: epochs between two falls')
    group.add_argument(
        '--lr-decay-fn', type=str, default=None, metavar='NAME',
        help='wsd, rsqrt: shape of the final decay, e.g. 1-sqrt, linear or cosine')
    group.add_argument(
        '--lr-stable-timescale', type=float, default=None, metavar='N',
        help='rsqrt: timescale in epochs; None: --warmup-epochs')
    group.add_argument('--decay-rate', '--dr', type=float, default=0.1, metavar='RATE', help='factor of each fall')
    group.add_argument(
        '--patience-epochs', type=int, default=10, metavar='N',
        help='plateau: epochs without progress before a fall')
    group.add_argument(
        '--lr-cycle-mul', type=float, default=1.0, metavar='MULT',
        help='length of each cycle relative to the one before')
    group.add_argument(
        '--lr-cycle-decay', type=float, default=0.5, metavar='MULT',
        help='peak of each cycle relative to the one before')
    group.add_argument('--lr-cycle-limit', type=int, default=1, metavar='N', help='number of cycles')
    group.add_argument('--lr-k-decay', type=float, default=1.0, help='exponent k of k-decay, for cosine and poly')
    group.add_argument(
        '--lr-noise', type=float, nargs='+', default=None, metavar='PCT',
        help='where noise on the rate starts and stops, as parts of the run')
    group.add_argument('--lr-noise-pct', type=float, default=0.67, metavar='PERCENT', help='largest relative noise')
    group.add_argument('--lr-noise-std', type=float, default=1.0, metavar='STDDEV', help='deviation of the noise')


def add_batch_norm_args(parser: ArgumentParser) -> None:
    group = parser.add_topic('bn', 'Batch norm')
    group.add_argument('--bn-momentum', type=float, default=None, help='for models whose constructor takes it')
    group.add_argument('--bn-eps', type=float, default=None, help='for models whose constructor takes it')
    group.add_argument(
        '--split-bn', action='store_true', default=False,
        help='batch norms of their own for each of --aug-splits; the saved model has those of the first')
    group.add_argument(
        '--sync-bn', action='store_true', default=False,
        help='batch statistics over all processes')
    group.add_argument(
        '--dist-bn', type=str, default='reduce',
        help='running statistics after each epoch: reduce (average), broadcast or empty')


def add_ema_args(parser: ArgumentParser) -> None:
    group = parser.add_topic('ema', 'Moving average of the weights')
    group.add_argument(
        '--model-ema', action='store_true', default=False,
        help='keep, validate and save an exponential moving average of the student')
    group.add_argument(
        '--model-ema-force-cpu', action='store_true', default=False,
        help='keep the average on the CPU; it is then not validated')
    group.add_argument('--model-ema-decay', type=float, default=0.9998, help='decay per update')
    group.add_argument(
        '--model-ema-warmup', action='store_true', default=False,
        help='let the decay rise to its value from the start of training')
