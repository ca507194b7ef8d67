"""Flags of `python -m timm_distill.export`."""
import argparse

from ..utils.console import program_name


def create_export_parser() -> argparse.ArgumentParser:
    """Parser of `python -m timm_distill.export`."""
    parser = argparse.ArgumentParser(
        prog=program_name('python -m timm_distill.export'),
        description='Give a student away: a checkpoint of train_distill.py as a hub folder, plain weights or ONNX')
    parser.add_argument(
        'checkpoint', metavar='CHECKPOINT',
        help='last.pth.tar, model_best.pth.tar or checkpoint-N.pth.tar of a run')
    parser.add_argument(
        '--output', metavar='DIR', default='',
        help="folder in the hub's format: config.json, model.safetensors, README.md (default: hub "
             'beside CHECKPOINT)')
    parser.add_argument(
        '--weights', metavar='FILE', default='',
        help='also write the weights alone, .safetensors or .pth')
    parser.add_argument(
        '--onnx', metavar='FILE', default='',
        help='also write an ONNX graph with a free batch size, compared with torch in onnxruntime')
    parser.add_argument(
        '--model', metavar='FILE.py:FUNCTION', default='',
        help='the student, where a function of a file builds it: the file is run')
    parser.add_argument(
        '--use-ema', action=argparse.BooleanOptionalAction, default=None,
        help='averaged weights or raw ones (default: averaged where the file has them)')
    parser.add_argument(
        '--push-to-hub', metavar='ID', default='',
        help='also upload the folder to the Hugging Face hub')
    return parser
