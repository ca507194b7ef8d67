"""Flags of what a run writes and says, and when."""
import argparse

from .parser import ArgumentParser


def add_output_args(parser: ArgumentParser) -> None:
    group = parser.add_topic('output', 'Output and logging')
    group.add_argument(
        '--output', type=str, default='', metavar='PATH',
        help='parent folder of the runs; empty: ./output/train')
    group.add_argument(
        '--experiment', type=str, default='', metavar='NAME',
        help='folder name of this run; empty: time, model and size')
    group.add_argument(
        '--overwrite', action='store_true', default=False,
        help='remove the run that the folder holds; without it or --resume such a folder is refused')
    group.add_argument(
        '--eval-metric', type=str, default='top1', metavar='NAME',
        help='what makes a checkpoint the best one: top1, top5, loss, or of frozen features knn, linear_probe, and '
             'without labels cosine')
    group.add_argument('--checkpoint-hist', type=int, default=10, metavar='N', help='checkpoints to keep')
    group.add_argument(
        '--recovery-interval', type=int, default=0, metavar='N',
        help='updates between two recovery checkpoints inside an epoch; 0: none')
    group.add_argument(
        '--on-nan', type=str, default='stop', metavar='WHAT',
        help='updates that are not finite are skipped; after 10 in a row: stop, rollback (to the newest '
             'checkpoint), or skip (go on)')
    group.add_argument(
        '--val-interval', type=int, default=1, metavar='N',
        help='epochs between two validations, each followed by a checkpoint')
    group.add_argument(
        '--probe-interval', type=int, default=0, metavar='N',
        help='epochs between two probes of the frozen features of student and teacher: top-1 of nearest neighbours '
             'and of a linear classifier; 0: none')
    group.add_argument(
        '--probe-dir', metavar='DIR', default='',
        help='labelled folder for the probes: class folders, or a training and a validation split of them; empty: the '
             'labelled validation split')
    group.add_argument('--log-interval', type=int, default=50, metavar='N', help='updates between two log lines')
    group.add_argument(
        '--log-style', type=str, default='auto', choices=['auto', 'bar', 'lines'],
        help='progress bar beside the log lines (auto: on a terminal), or lines alone')
    group.add_argument(
        '--log-tensorboard', action='store_true', default=False,
        help='log the metrics of each epoch for TensorBoard into the folder of the run')
    group.add_argument(
        '--report', action=argparse.BooleanOptionalAction, default=True,
        help='write report.html and report.png at the end (needs matplotlib)')
    group.add_argument(
        '--push-to-hub', type=str, default='', metavar='ID',
        help='upload the best student, OUTPUT/hub, to this repository of the Hugging Face hub')
    group.add_argument(
        '--save-epochs', type=int, nargs='+', default=[], metavar='N',
        help='keep milestone-N.pth.tar after each of these many epochs')
    group.add_argument(
        '--save-images', action='store_true', default=False,
        help='save the training batch of every log line as a picture')
    group.add_argument(
        '--tta', type=int, default=0, metavar='N',
        help='average the outputs of N consecutive inputs in validation; 0: off')
    group.add_argument(
        '--worker-seeding', type=str, default='all',
        help='generators seeded in loader processes: all, or part (not NumPy\'s)')
    group.add_argument(
        '--use-multi-epochs-loader', action='store_true', default=False,
        help='keep loader processes over epochs: faster, but a resumed run sees other augmentations')


def add_wandb_args(parser: ArgumentParser) -> None:
    group = parser.add_topic('wandb', 'Weights & Biases')
    group.add_argument(
        '--log-wandb', action='store_true', default=False,
        help='log the metrics of each epoch to Weights & Biases, where its package is installed')
    group.add_argument('--wandb-project', type=str, default=None, metavar='NAME', help='project of the run')
    group.add_argument('--wandb-tags', type=str, nargs='+', default=[], metavar='TAG', help='tags of the run')
    group.add_argument(
        '--wandb-resume-id', type=str, default='', metavar='ID',
        help='with --resume: go on with this run of Weights & Biases')
