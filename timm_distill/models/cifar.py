"""CIFAR networks of the distillation papers: ResNet, WRN, VGG, MobileNetV2, ShuffleNetV1 and V2 for 32 x 32 images.

The sizes are those of the code that the papers' CIFAR-100 tables were computed with (CRD, Tian et al., ICLR 2020, and
what followed it); parameters, multiply-adds and stage shapes agree to the digit. Architectures: He et al., CVPR 2016
(`cifar_resnet*`); Zagoruyko and Komodakis, BMVC 2016 (`cifar_wrn_*`); Simonyan and Zisserman, ICLR 2015, with batch
norm (`cifar_vgg*`); Sandler et al., CVPR 2018, at half width (`cifar_mobilenetv2`); Zhang et al., CVPR 2018
(`cifar_shufflenetv1`); Ma et al., ECCV 2018 (`cifar_shufflenetv2`).
"""
import math
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.layers import SelectAdaptivePool2d, create_classifier
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model

from ..utils._compat import feature_take_indices
from ._blocks import (
    InvertedResidual,
    PoolLarge,
    PreActivationBlock,
    ShuffleUnitV1,
    ShuffleUnitV2,
    basic_block,
    bottleneck_block,
    conv_norm,
)

CIFAR100_MEAN = (0.5071, 0.4867, 0.4408)
CIFAR100_STD = (0.2675, 0.2565, 0.2761)


class CifarNet(nn.Module):
    """Stem, stages, final layers, pooling and a linear classifier.

    Args:
        stem: First layers.
        stages: What follows, each with a map of its own size or width.
        widths: Output channels of stem and stages.
        reductions: Input size over output size of stem and stages.
        num_features: Channels of the feature that the classifier reads, pooled.
        final: Layers between the last stage and the pooling.
        in_chans: Channels of the input; here to be known.
        num_classes: Classes; 0 for no classifier.
        global_pool: Pooling of the last map: 'avg', 'max', 'avgmax', 'catavgmax', or '' for none.
        drop_rate: Dropout before the classifier.
        init: 'fan_out' draws convolutions as He et al. (ICCV 2015) do, 'fan_out_normal' the classifier from a normal
            distribution of deviation 0.01 besides, 'default' leaves torch's weights.
    """

    def __init__(
            self,
            stem: nn.Module,
            stages: Sequence[nn.Module],
            widths: Sequence[int],
            reductions: Sequence[int],
            num_features: int,
            final: Optional[nn.Module] = None,
            in_chans: int = 3,
            num_classes: int = 100,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            init: str = 'fan_out',
    ):
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.num_features = self.head_hidden_size = num_features
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.final = final if final is not None else nn.Identity()
        modules = ['stem', *(f'stages.{i}' for i in range(len(stages)))]
        self.feature_info = [
            dict(num_chs=width, reduction=reduction, module=module)
            for width, reduction, module in zip(widths, reductions, modules)]
        self.global_pool, self.head_drop, self.fc = create_classifier(
            num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self._init_weights(init)

    def _init_weights(self, init: str) -> None:
        for module in self.modules():
            if init != 'default' and isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if init == 'fan_out_normal' and isinstance(self.fc, nn.Linear):
            nn.init.normal_(self.fc.weight, std=0.01)
            nn.init.zeros_(self.fc.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Return how parameters belong to layers, for layer-wise learning rates."""
        blocks = r'^stages\.(\d+)' if coarse else [(r'^stages\.(\d+)\.(\d+)', None), (r'^final', (99999,))]
        return dict(stem=r'^stem', blocks=blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the stages' activations in the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Give the model another classifier, new weights included; 0 classes for none."""
        self.num_classes = num_classes
        pool = global_pool if global_pool is not None else self._pool_type()
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=pool)

    def _pool_type(self) -> str:
        return self.global_pool.pool_type if isinstance(self.global_pool, SelectAdaptivePool2d) else ''

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Return the outputs of stem and stages, and of the final layers.

        Args:
            x: Images, [B, C, H, W].
            indices: The last n outputs if an integer, all if None, those of a list.
            norm: Run the final layers on the last stage's output, where they are a norm.
            stop_early: Stop after the last output that is asked for.
            output_fmt: 'NCHW'.
            intermediates_only: Leave out the final output.
        """
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        last = len(self.stages)
        take_indices, max_index = feature_take_indices(last + 1, indices)
        norm = norm and self._final_keeps_width()
        intermediates = []
        x = self.stem(x)
        if 0 in take_indices:
            intermediates.append(x)
        stages = self.stages if torch.jit.is_scripting() or not stop_early else self.stages[:max_index]
        for i, stage in enumerate(stages, 1):
            x = stage(x)
            if i in take_indices:
                intermediates.append(self.final(x) if norm and i == last else x)
        return intermediates if intermediates_only else (self.final(x), intermediates)

    def _final_keeps_width(self) -> bool:
        return self.feature_info[-1]['num_chs'] == self.num_features

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Drop what the outputs of `forward_intermediates` that are asked for do not need; return their indices."""
        take_indices, max_index = feature_take_indices(len(self.stages) + 1, indices)
        self.stages = self.stages[:max_index]
        if prune_norm or max_index < len(self.feature_info) - 1:
            self.final = nn.Identity()
        if prune_head:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the last map, [B, num_features, H, W]."""
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.stages, x)
        else:
            x = self.stages(x)
        return self.final(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Return logits [B, K] of a map, or the classifier's input."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        'url': '', 'num_classes': 100, 'input_size': (3, 32, 32), 'pool_size': (8, 8), 'crop_pct': 1.0,
        'interpolation': 'bilinear', 'mean': CIFAR100_MEAN, 'std': CIFAR100_STD, 'first_conv': 'stem.0',
        'classifier': 'fc', **kwargs,
    }


def _stage(block: Any, depth: int, in_chs: int, out_chs: int, stride: int) -> nn.Sequential:
    first = block(in_chs, out_chs, stride)
    return nn.Sequential(first, *(block(out_chs, out_chs, 1) for _ in range(depth - 1)))


def _stages(block: Any, depths: Sequence[int], widths: Sequence[int], strides: Sequence[int]) -> List[nn.Module]:
    """Return stages from the widths of stem and stages."""
    return [_stage(block, *of_stage) for of_stage in zip(depths, widths, widths[1:], strides)]


def _reductions(strides: Sequence[int]) -> List[int]:
    """Return input size over output size behind each of the strides."""
    return [math.prod(strides[:i + 1]) for i in range(len(strides))]


def _resnet(depth: int, widths: Sequence[int], in_chans: int = 3, **kwargs: Any) -> CifarNet:
    strides = (1, 2, 2)
    stages = _stages(basic_block, [(depth - 2) // 6] * 3, widths, strides)
    return CifarNet(
        conv_norm(in_chans, widths[0], 3), stages, widths, _reductions((1, *strides)), widths[-1], in_chans=in_chans,
        **kwargs)


def _resnet50(in_chans: int = 3, **kwargs: Any) -> CifarNet:
    widths, strides = (64, 256, 512, 1024, 2048), (1, 2, 2, 2)
    stages = _stages(bottleneck_block, (3, 4, 6, 3), widths, strides)
    return CifarNet(
        conv_norm(in_chans, 64, 3), stages, widths, _reductions((1, *strides)), 2048, in_chans=in_chans, **kwargs)


def _wrn(depth: int, widen: int, in_chans: int = 3, **kwargs: Any) -> CifarNet:
    widths, strides = (16, 16 * widen, 32 * widen, 64 * widen), (1, 2, 2)
    stages = _stages(PreActivationBlock, [(depth - 4) // 6] * 3, widths, strides)
    stem = nn.Sequential(nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False))
    final = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU())
    return CifarNet(
        stem, stages, widths, _reductions((1, *strides)), widths[-1], final, in_chans=in_chans, **kwargs)


def _plain(depth: int, in_chs: int, out_chs: int) -> List[nn.Sequential]:
    return [conv_norm(out_chs if i else in_chs, out_chs, 3, bias=True) for i in range(depth)]


def _vgg(depths: Sequence[int], in_chans: int = 3, **kwargs: Any) -> CifarNet:
    widths = (64, 128, 256, 512, 512)
    pools = [nn.MaxPool2d(2), nn.MaxPool2d(2), nn.MaxPool2d(2), PoolLarge()]
    stages = [
        nn.Sequential(pool, *_plain(depth, chs_in, chs_out))
        for pool, depth, chs_in, chs_out in zip(pools, depths[1:], widths, widths[1:])]
    stem = nn.Sequential(*(layer for block in _plain(depths[0], in_chans, widths[0]) for layer in block))
    return CifarNet(
        stem, stages, widths, (1, 2, 4, 8, 8), 512, in_chans=in_chans, init='fan_out_normal', **kwargs)


def _mobilenetv2(in_chans: int = 3, **kwargs: Any) -> CifarNet:
    # expansion, width at half, depth, stride of the published settings; a stage ends before each halving of the map
    settings = ((1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1))
    stages: List[nn.Module] = []
    blocks: List[nn.Module] = []
    chs = 16
    for expansion, width, depth, stride in settings:
        if stride == 2:
            stages.append(nn.Sequential(*blocks))
            blocks = []
        for i in range(depth):
            blocks.append(InvertedResidual(chs, width, stride if i == 0 else 1, expansion))
            chs = width
    stages.append(nn.Sequential(*blocks))
    return CifarNet(
        conv_norm(in_chans, 16, 3, 2), stages, (16, 12, 16, 48, 160), (2, 2, 4, 8, 16), 1280, conv_norm(160, 1280),
        in_chans=in_chans, init='fan_out_normal', **kwargs)


def _shufflenetv1(in_chans: int = 3, groups: int = 3, **kwargs: Any) -> CifarNet:
    widths = (24, 240, 480, 960)
    stages = []
    for i, (depth, chs_in, chs_out) in enumerate(zip((4, 8, 4), widths, widths[1:])):
        first = ShuffleUnitV1(chs_in, chs_out, 2, groups, groups if i else 1)  # 24 channels are not divided
        stages.append(nn.Sequential(
            first, *(ShuffleUnitV1(chs_out, chs_out, 1, groups, groups) for _ in range(depth - 1))))
    return CifarNet(
        conv_norm(in_chans, 24), stages, widths, (1, 2, 4, 8), 960, in_chans=in_chans, init='default', **kwargs)


def _shufflenetv2(in_chans: int = 3, **kwargs: Any) -> CifarNet:
    widths = (24, 116, 232, 464)
    stages = _stages(ShuffleUnitV2, (4, 8, 4), widths, (2, 2, 2))
    return CifarNet(
        conv_norm(in_chans, 24), stages, widths, (1, 2, 4, 8), 1024, conv_norm(464, 1024), in_chans=in_chans,
        init='default', **kwargs)


_SMALL, _WIDE = (16, 16, 32, 64), (32, 64, 128, 256)
_VARIANTS: Dict[str, Callable[..., CifarNet]] = {
    **{f'cifar_resnet{depth}': partial(_resnet, depth, _SMALL) for depth in (8, 14, 20, 32, 44, 56, 110)},
    'cifar_resnet8x4': partial(_resnet, 8, _WIDE),
    'cifar_resnet32x4': partial(_resnet, 32, _WIDE),
    'cifar_resnet50': _resnet50,
    **{f'cifar_wrn_{depth}_{widen}': partial(_wrn, depth, widen) for depth in (16, 40) for widen in (1, 2)},
    'cifar_vgg8': partial(_vgg, (1, 1, 1, 1, 1)),
    'cifar_vgg11': partial(_vgg, (1, 1, 2, 2, 2)),
    'cifar_vgg13': partial(_vgg, (2, 2, 2, 2, 2)),
    'cifar_vgg16': partial(_vgg, (2, 2, 3, 3, 3)),
    'cifar_vgg19': partial(_vgg, (2, 2, 4, 4, 4)),
    'cifar_mobilenetv2': _mobilenetv2,
    'cifar_shufflenetv1': _shufflenetv1,
    'cifar_shufflenetv2': _shufflenetv2,
}
_FIVE_OUTPUTS = (_resnet50, _vgg, _mobilenetv2)  # a stem and four stages; the others have three

default_cfgs = generate_default_cfgs({variant: _cfg() for variant in _VARIANTS})


def _register(variant: str, model_cls: Callable[..., CifarNet]) -> None:
    outputs = 5 if getattr(model_cls, 'func', model_cls) in _FIVE_OUTPUTS else 4

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> CifarNet:
        return build_model_with_cfg(
            model_cls, variant, pretrained,
            feature_cfg=dict(out_indices=tuple(range(outputs)), feature_cls='getter'), **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = variant
    register_model(entrypoint)


for _variant, _model_cls in _VARIANTS.items():
    _register(_variant, _model_cls)
