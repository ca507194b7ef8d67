"""Export from the command line.

    python -m timm_distill.export output/train/RUN/model_best.pth.tar --output released
"""
import argparse
import logging
import os
import sys
from typing import Optional, Sequence, Tuple

from safetensors import SafetensorError
from timm.utils import setup_default_logging

from ..args import create_export_parser
from ..checkpoint.file import check_file, check_folder, why_unwritten
from ..errors import UsageError
from ..models.external import is_external
from ..utils.console import program_name, run_script
from .release import (
    Release,
    _require,
    export_hub,
    export_onnx,
    export_weights,
    load_release,
    push_to_hub,
)

_logger = logging.getLogger(__name__)


def main(argv: Optional[Sequence[str]] = None) -> Tuple[str, ...]:
    """Run from the command line; return what was written.

    Raises:
        UsageError: For anything that the user can put right.
    """
    args = create_export_parser().parse_args(argv)
    for flag, path in (('--weights', args.weights), ('--onnx', args.onnx)):
        if path:
            check_file(path, flag)
    folder = args.output or os.path.join(os.path.dirname(os.path.abspath(args.checkpoint)), 'hub')
    check_folder(folder, '--output')
    if args.onnx:
        _require('onnx', 'onnxscript', 'onnxruntime')
    release = load_release(args.checkpoint, args.use_ema, args.model)
    try:
        return _write(release, args, folder)
    except (OSError, SafetensorError) as e:
        raise UsageError(
            f'The release could not be written ({why_unwritten(e)}): make room, or give another --output, --weights '
            'or --onnx. What was complete before stays.') from e


def _write(release: Release, args: argparse.Namespace, folder: str) -> Tuple[str, ...]:
    written = [export_hub(release, folder)]
    if is_external(release.architecture):
        _logger.info(f'Folder {folder}: not a model of timm, its README.md says how to load it.')
    else:
        _logger.info(f"Hub folder {folder}: timm.create_model('local-dir:{folder}', pretrained=True)")
    if args.weights:
        written.append(export_weights(release, args.weights))
        how = f"timm.create_model('{release.architecture}', checkpoint_path=...)"
        if is_external(release.architecture):
            how = f'a state dict of {release.architecture}'
        _logger.info(f'Weights {args.weights}: {how}')
    if args.onnx:
        error = export_onnx(release, args.onnx)
        written.append(args.onnx)
        _logger.info(f"ONNX {args.onnx}: largest logit difference to torch {error:.1e} of the logits' spread.")
    if args.push_to_hub:
        _logger.info(f'Pushed to {push_to_hub(folder, args.push_to_hub)}')
    return tuple(written)


def cli() -> int:
    """Run from the command line: 0 on success, 2 for what the user can put right."""
    setup_default_logging()
    try:
        main()
    except UsageError as e:
        print(f'{program_name("timm_distill.export")}: error: {e}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(run_script(cli))
