"""Parts of a model that timm did not build: trunk, head and stages, found in its traced graph.

The model keeps its class, its modules and its state dict; it gains timm's methods for parts of a forward, each a
function of the same modules, for training and for evaluation. What is found is measured: the parts together give what
the model gives.
"""
import logging
import math
from dataclasses import dataclass
from typing import Any, Callable, ClassVar, Dict, List, Mapping, Optional, Sequence, Set, Tuple, cast

import torch
import torch.nn as nn
from torch import fx
from torch.fx.passes.shape_prop import ShapeProp

from ..errors import UsageError
from .inputs import CANNOT_RUN, evaluation_mode, logits_of, random_images, runnable_size
from .stages import count_classes, has_head

_logger = logging.getLogger(__name__)

_TOLERANCE = 1e-5  # of the logits' spread, in float32


@dataclass(frozen=True)
class _Functions:
    """Parts of a forward as functions of (model, tensor)."""
    trunk: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    head: Callable[[nn.Module, torch.Tensor], Any]
    pre_logits: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    stages: Callable[[nn.Module, torch.Tensor], Tuple[torch.Tensor, ...]]


class _WithParts(nn.Module):
    """timm's methods for a model that was traced. They are the class's, so that copies of the model have them."""
    parts: ClassVar[Mapping[bool, _Functions]]  # by whether the model trains
    classifier_name: ClassVar[str]
    channels_last_stages: ClassVar[Tuple[bool, ...]]

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts[self.training].trunk(self, x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> Any:
        functions = self.parts[self.training]
        return functions.pre_logits(self, x) if pre_logits else functions.head(self, x)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Sequence[int]] = None,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Any:
        raw, *found = self.parts[self.training].stages(self, x)
        maps = [map_.permute(0, 3, 1, 2) if nhwc else map_ for map_, nhwc in zip(found, self.channels_last_stages)]
        chosen = maps if indices is None else [maps[index] for index in indices]
        return chosen if intermediates_only else (raw, chosen)

    def get_classifier(self) -> nn.Module:
        return self.get_submodule(self.classifier_name)


def complete(model: nn.Module, name: str, role: str, in_chans: int = 3, num_classes: Optional[int] = None) -> nn.Module:
    """Give a model that timm did not build what timm's have: `num_classes`, and the methods for its parts.

    Args:
        model: Gives logits; its `pretrained_cfg` may say its input size. Is changed.
        name: What it was named by, for messages.
        role: By which flag.
        in_chans: Channels of its input.
        num_classes: Classes that it is to have, None for those it has.

    Raises:
        UsageError: If it runs on no images, or has another class count.
    """
    config = getattr(model, 'pretrained_cfg', None) or {}
    wanted = (in_chans, *tuple(config.get('input_size', (3, 224, 224)))[1:])
    size, reason = runnable_size(model, wanted)
    if reason:
        raise UsageError(
            f'The {role} {name} does not run on images {list(wanted)}: {reason}. Let its function return the size that '
            "it takes, (model, {'size': N}).")
    own_input = (in_chans, *(size or wanted[1:]))
    count = count_classes(model, own_input)
    if num_classes is not None and count != num_classes:
        raise UsageError(
            f'The {role} {name} has {count} classes, --num-classes asks for {num_classes}: change the flag, or let its '
            'function take num_classes.')
    cast(Any, model).num_classes = count
    return add_parts(model, own_input)


def add_parts(model: nn.Module, input_size: Sequence[int]) -> nn.Module:
    """Give a model timm's methods for trunk, head and stages, where these can be found; else it stays as it is.

    Its last-stage feature is the last tensor with several positions that all of the output is computed from; its
    stages are the last such maps of every grid.

    Args:
        model: Gives logits. Its class is replaced by one that inherits from it.
        input_size: Input that it runs on, (channels, height, width).
    """
    if has_head(model):
        return model
    try:
        parted = type(type(model).__name__, (_WithParts, type(model)), _find_parts(model, input_size))
        error = max(_difference(model, parted, input_size, training) for training in (False, True))
    except (*CANNOT_RUN, fx.proxy.TraceError) as e:
        reason = ' '.join(str(e).split())[:200]
        _logger.info(f'{type(model).__name__} is read at the input of its classifier alone, it has no parts: {reason}.')
        return model
    if not error <= _TOLERANCE:
        _logger.info(
            f'{type(model).__name__} is read at the input of its classifier alone: its parts give other logits '
            f'(difference {error:.1e}).')
        return model
    model.__class__ = parted
    return model


def _find_parts(model: nn.Module, input_size: Sequence[int]) -> Dict[str, Any]:
    """Return the attributes of a class with the parts of a model.

    Raises:
        ValueError: If it has no feature, or no linear classifier behind it.
    """
    with evaluation_mode(model):
        graph = fx.Tracer().trace(model)
        ShapeProp(fx.GraphModule(model, graph)).propagate(random_images(model, input_size))
    cuts = _find_cuts(graph)
    if not cuts:
        raise ValueError('no single tensor with several positions is what all of its output is computed from')
    order = {node: index for index, node in enumerate(graph.nodes)}
    classifiers = [node for node in graph.nodes if isinstance(_module(model, node), nn.Linear)]
    if not classifiers or order[classifiers[-1]] < order[cuts[-1]]:
        raise ValueError('it has no linear classifier behind its last feature')
    maps = [node for node in cuts if len(_shape(node)) == 4]
    # maps before tokens are no stages of theirs
    stages = list({_grid(node): node for node in maps}.values()) if maps and maps[-1] is cuts[-1] else []
    names = [node.name for node in (cuts[-1], classifiers[-1], *stages)]
    return dict(
        parts={False: _split(graph, names), True: _split(_trace_training(model), names)},
        classifier_name=str(classifiers[-1].target),
        channels_last_stages=tuple(map(_is_channels_last, stages)),
        num_features=_shape(cuts[-1])[-1 if len(_shape(cuts[-1])) == 3 or _is_channels_last(cuts[-1]) else 1],
    )


def _trace_training(model: nn.Module) -> fx.Graph:
    with evaluation_mode(model):  # puts the modes back
        return fx.Tracer().trace(model.train())


def _find_cuts(graph: fx.Graph) -> List[fx.Node]:
    """Return the nodes with several positions that all that comes after them is computed from, in order."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    cuts, last_use = [], -1  # of any node before, by index
    for node, index in order.items():
        if node.op == 'get_attr':  # a parameter, which can be read anywhere
            continue
        if last_use <= index and _has_positions(node):
            cuts.append(node)
        last_use = max([last_use, *(order[user] for user in node.users)])
    return cuts


def _shape(node: fx.Node) -> Tuple[int, ...]:
    """Return the shape of a node's tensor, () for anything else."""
    meta = node.meta.get('tensor_meta')
    return tuple(getattr(meta, 'shape', ()))


def _has_positions(node: fx.Node) -> bool:
    shape = _shape(node)
    if node.op == 'placeholder' or len(shape) not in (3, 4):
        return False
    return math.prod(_grid(node)) > 1 if len(shape) == 4 else shape[1] > 1


def _is_channels_last(node: fx.Node) -> bool:
    """Whether the first two dimensions of a map are its grid: images are square where the two dimensions agree."""
    _, a, b, c = _shape(node)
    return a == b and b != c


def _grid(node: fx.Node) -> Tuple[int, int]:
    _, *sizes = _shape(node)
    return (sizes[0], sizes[1]) if _is_channels_last(node) else (sizes[1], sizes[2])


def _module(model: nn.Module, node: fx.Node) -> Optional[nn.Module]:
    return model.get_submodule(str(node.target)) if node.op == 'call_module' else None


def _split(graph: fx.Graph, names: Sequence[str]) -> _Functions:
    """Return the parts of a graph, by the names of feature, classifier and stages."""
    nodes = {node.name: node for node in graph.nodes}
    cut, classifier, *stages = (nodes[name] for name in names)
    output = next(node for node in graph.nodes if node.op == 'output')
    return _Functions(
        trunk=_function(graph, None, cut),
        head=_function(graph, cut, output.args[0]),
        pre_logits=_function(graph, cut, classifier.args[0]),
        stages=_function(graph, None, (cut, *stages)),
    )


def _function(graph: fx.Graph, start: Optional[fx.Node], result: Any) -> Callable[[nn.Module, torch.Tensor], Any]:
    """Return what a graph computes of its input, or of the tensor of a node, as a function of (model, tensor)."""
    part = fx.Graph()
    tensor = part.placeholder('x')
    start = start or next(node for node in graph.nodes if node.op == 'placeholder')
    known, needed = {start: tensor}, _needed(result, start)
    if any(node.op == 'placeholder' for node in needed):  # auxiliary classifiers in training
        raise ValueError('what it gives in training is not computed from its last feature alone')
    for node in graph.nodes:
        if node in needed:
            known[node] = part.node_copy(node, lambda n: known[n])
    part.output(fx.node.map_arg(result, lambda n: known[n]))
    code = part.python_code('self')
    namespace = dict(code.globals)
    exec(code.src, namespace)  # what torch.fx wrote of the model's own forward
    return cast(Callable[[nn.Module, torch.Tensor], Any], namespace['forward'])


def _needed(result: Any, start: fx.Node) -> Set[fx.Node]:
    """Return the nodes that a result is computed from, without the one where the computation starts."""
    waiting: List[fx.Node] = []
    fx.node.map_arg(result, waiting.append)
    needed: Set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node is not start and node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    return needed


def _difference(model: nn.Module, parted: type, input_size: Sequence[int], training: bool) -> float:
    """Return how far the parts' logits are from the model's own, relative to their spread, in a mode."""
    images, own = random_images(model, input_size), type(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    outputs = []
    for cls in (own, parted):
        with evaluation_mode(model), torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
            torch.manual_seed(0)
            model.train(training).__class__ = cls
            try:
                output = model(images) if cls is own else model.forward_head(model.forward_features(images))
            finally:
                model.__class__ = own
                for name, buffer in model.named_buffers():
                    buffer.copy_(buffers[name])
        outputs.append(logits_of(output).float())
    expected, actual = outputs
    return ((actual - expected).abs().max() / (expected - expected.mean()).abs().max().clamp_min(1e-12)).item()
