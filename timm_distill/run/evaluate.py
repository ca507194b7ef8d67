"""Evaluation of one model as the flags of the validation script say: build, load data, measure, a row of results.

The model is built by timm alone.
"""
import logging
from argparse import Namespace
from collections import OrderedDict
from typing import Any, Dict, List, Optional, Sequence, Tuple, cast

import torch
import torch.nn as nn
from timm import utils
from timm.data import RealLabelsImagenet, resolve_data_config
from timm.layers import apply_test_time_pool, set_fast_norm
from timm.models import get_pretrained_cfg, reparameterize_model
from torch.utils.data import Dataset

from ..args import PROBE_METRICS
from ..checkpoint.weights import read_weights
from ..data import create_eval_dataset, create_eval_loader
from ..data.probes import create_probe_splits
from ..engine.evaluate import ComputeSpec, evaluate, evaluator_class
from ..errors import UsageError
from ..features.classifier import is_headless
from ..features.inputs import find_patch_size
from ..features.parts import complete
from ..features.pooled import PooledFeatures
from ..models.external import is_external
from ..models.named import check_name, create_model
from .device import Precision, enable_fast_math, resolve_device_name, resolve_precision
from .probing import collect_features, probe_features

_logger = logging.getLogger(__name__)


def evaluate_model(args: Namespace) -> Dict[str, Any]:
    """Build model and loader, evaluate, and return a row of results.

    Raises:
        UsageError: If the model, its weights or its data cannot be used with these flags.
    """
    utils.random_seed(args.seed)
    device = torch.device(resolve_device_name(args.device))
    precision = resolve_precision(device, args.amp, args.amp_dtype, args.model_dtype)
    enable_fast_math()
    if args.fuser:
        utils.set_jit_fuser(args.fuser)
    if args.fast_norm:
        set_fast_norm()
    model = build_model(args)
    data_config = resolve_data_config(vars(args), model=model, use_test_size=not args.use_train_size, verbose=True)
    param_count = sum(p.numel() for p in model.parameters())
    probes = [name for name, asked in zip(PROBE_METRICS, (args.knn, args.probe)) if asked]
    if is_headless(model) and not probes:
        raise UsageError(f"--model '{args.model}' has no classifier: --knn and --probe measure its features")
    metrics: Dict[str, float] = OrderedDict()
    if probes:
        metrics.update(probe_model(args, model, data_config, device, precision, probes))
    if not is_headless(model):
        classified, data_config = classify(args, model, data_config, device, precision)
        metrics.update(classified)
    return create_results(args.model, metrics, data_config, param_count)


def probe_model(
        args: Namespace,
        model: nn.Module,
        data_config: Dict[str, Any],
        device: torch.device,
        precision: Precision,
        names: Sequence[str],
) -> Dict[str, float]:
    """Return the top-1 accuracies of probes of a model's frozen features."""
    loaders = [
        create_eval_loader(args, data_config, dataset, device, model_dtype=precision.model_dtype, persistent=False)
        for dataset in create_probe_splits(args, data_config)]
    pooled = PooledFeatures(model.to(device=device, dtype=precision.model_dtype), data_config['input_size']).eval()
    compute = _compute_spec(args, device, precision)
    return probe_features([collect_features(pooled, loader, compute) for loader in loaders], device, names)


def _compute_spec(args: Namespace, device: torch.device, precision: Precision) -> ComputeSpec:
    return ComputeSpec(device, precision.model_dtype, precision.autocast, args.channels_last, not args.no_prefetcher)


def classify(
        args: Namespace,
        model: nn.Module,
        data_config: Dict[str, Any],
        device: torch.device,
        precision: Precision,
) -> Tuple[Dict[str, float], Dict[str, Any]]:
    """Return the metrics of a model's predictions, and the data config as test-time pooling leaves it."""
    num_classes = cast(int, model.num_classes)
    valid_labels = read_valid_labels(args.valid_labels, num_classes)
    dataset = create_eval_dataset(args, data_config, len(valid_labels) or num_classes)
    patch_size = find_patch_size(model) if args.naflex_loader else None
    model, data_config = prepare_model(model, data_config, args, device, precision.model_dtype)
    extras = ExtraMetrics(args, dataset)
    metrics = evaluate(
        SelectedClasses(model, valid_labels) if valid_labels else model,
        create_eval_loader(
            args, data_config, dataset, device, model_dtype=precision.model_dtype,
            patch_size=patch_size),
        _compute_spec(args, device, precision),
        create_evaluator=evaluator_class(args.task, args.multilabel_threshold),
        on_output=extras.add,
        log_interval=args.log_freq,
    )
    metrics.update(extras.compute())
    return metrics, data_config


def build_model(args: Namespace) -> nn.Module:
    """Create the model with the weights of --checkpoint, or else with its pretrained ones."""
    check_name(args.model, 'model')
    state_dict = None
    if args.checkpoint:
        kind = None if args.use_ema else 'raw'
        state_dict = read_weights(args.checkpoint, '--checkpoint', kind, 'give --use-ema').state_dict
    num_classes = args.num_classes
    if num_classes is None and state_dict is not None:
        num_classes = infer_num_classes(args.model, state_dict)
    model = create_model(
        args.model, 'model', '--model-kwargs',
        pretrained=args.pretrained or state_dict is None,
        num_classes=num_classes,
        in_chans=args.in_chans or (args.input_size[0] if args.input_size else 3),
        global_pool=args.gp,
        scriptable=args.torchscript,
        **args.model_kwargs,
    )
    if is_external(args.model):
        complete(model, args.model, 'model', args.in_chans or 3, num_classes)
    if state_dict is not None:
        load_weights(model, state_dict, args)
    return reparameterize_model(model) if args.reparam else model


def infer_num_classes(name: str, state_dict: Dict[str, torch.Tensor]) -> Optional[int]:
    """Rows of the classifier in the weights, 0 where they have none; None where the classifier's name is not known."""
    cfg = None if ':' in name else get_pretrained_cfg(name, allow_unregistered=True)
    classifier = getattr(cfg, 'classifier', None)
    if isinstance(classifier, (tuple, list)):
        classifier = classifier[0]
    weight = state_dict.get(f'{classifier}.weight')
    if weight is None:
        return None if not classifier or any(name.startswith(f'{classifier}.') for name in state_dict) else 0
    return weight.shape[0]


def load_weights(model: nn.Module, state_dict: Dict[str, torch.Tensor], args: Namespace) -> None:
    """Load a state dict strictly."""
    try:
        model.load_state_dict(state_dict)
    except (AttributeError, RuntimeError, TypeError) as e:  # also where the file holds no state dict at all
        reason = ' '.join(str(e).split())
        raise UsageError(
            f"--checkpoint '{args.checkpoint}' does not fit --model {args.model}, name the model it was trained as "
            f'(with its --num-classes and --model-kwargs): {reason[:300]}') from e


def read_valid_labels(path: str, num_classes: int) -> List[int]:
    """Read `--valid-labels`, one class index per line; empty without a file."""
    if not path:
        return []
    try:
        with open(path, encoding='utf-8') as f:
            labels = [int(line) for line in f if line.strip()]
    except (OSError, ValueError) as e:
        raise UsageError(f"--valid-labels '{path}' must be a text file with one class index per line: {e}") from e
    wrong = [label for label in labels if not 0 <= label < num_classes]
    if wrong or not labels or len(set(labels)) < len(labels):
        reason = f'{wrong[0]} is none' if wrong else 'one is there twice' if labels else 'it is empty'
        raise UsageError(
            f"--valid-labels '{path}' must hold different class indices from 0 to {num_classes - 1}: "
            f'{reason}')
    return labels


def prepare_model(
        model: nn.Module,
        data_config: Dict[str, Any],
        args: Namespace,
        device: torch.device,
        model_dtype: Optional[torch.dtype],
) -> Tuple[nn.Module, Dict[str, Any]]:
    """Apply test-time pooling, placement and compilation; pooling also changes the crop."""
    if args.test_pool:
        model, pools = apply_test_time_pool(model, data_config)
        if pools:
            data_config = {**data_config, 'crop_pct': 1.0}
    model = model.to(device=device, dtype=model_dtype)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    model = compile_model(model, args)
    if args.num_gpu > 1:
        if args.num_gpu > torch.cuda.device_count():
            raise UsageError(f'--num-gpu {args.num_gpu} is more than there are here: {torch.cuda.device_count()}')
        model = nn.DataParallel(model, device_ids=list(range(args.num_gpu)))
    return model, data_config


def compile_model(model: nn.Module, args: Namespace) -> nn.Module:
    """Apply `--torchscript`, `--torchcompile` or `--aot-autograd`."""
    if args.torchscript:
        try:
            return torch.jit.script(model)
        except Exception as e:  # whatever the compiler does not know
            raise UsageError(f"--torchscript: '{args.model}' cannot be scripted: {str(e).strip()[:200]!r}") from e
    if args.torchcompile:
        return cast(nn.Module, torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode))
    if args.aot_autograd:
        try:
            from functorch.compile import memory_efficient_fusion
        except ImportError as e:
            raise UsageError(
                '--aot-autograd needs functorch, which this torch lacks: --torchcompile does the '
                'same') from e
        return memory_efficient_fusion(model)
    return model


class SelectedClasses(nn.Module):
    """A model's logits for some of its classes, in the given order."""

    def __init__(self, model: nn.Module, labels: List[int]):
        super().__init__()
        self.model = model
        self.labels = labels

    def forward(self, images: Any) -> torch.Tensor:
        return self.model(images)[:, self.labels]


class ExtraMetrics:
    """Metrics of `--real-labels` and `--metrics-avg` beside the evaluator's.

    Args:
        args: Arguments of the validation script.
        dataset: Names the images for the former.
    """

    def __init__(self, args: Namespace, dataset: Dataset):
        self.average = _usable_average(args)
        self.real_labels = None
        self.predictions: List[torch.Tensor] = []
        self.targets: List[torch.Tensor] = []
        if args.real_labels:
            try:
                names = cast(Any, dataset).filenames(basename=True)
                self.real_labels = RealLabelsImagenet(names, real_json=args.real_labels)
            except (AssertionError, AttributeError, OSError, ValueError) as e:
                raise UsageError(
                    f"--real-labels '{args.real_labels}' needs the 50,000 validation images of ImageNet "
                    'under their own names, and the JSON file of their labels') from e

    def add(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Note a batch."""
        if self.real_labels is not None:
            self.real_labels.add_result(output)
        if self.average:
            self.predictions.append(output.argmax(dim=1).cpu())
            self.targets.append(target.cpu())

    def compute(self) -> Dict[str, float]:
        """Return the metrics in percent; the accuracies on real labels replace the ordinary ones, as in timm."""
        metrics: Dict[str, float] = {}
        if self.real_labels is not None:
            metrics.update(top1=self.real_labels.get_accuracy(k=1), top5=self.real_labels.get_accuracy(k=5))
        if self.average:
            from sklearn.metrics import precision_recall_fscore_support
            precision, recall, f1, _ = precision_recall_fscore_support(
                torch.cat(self.targets).numpy(), torch.cat(self.predictions).numpy(), average=self.average,
                zero_division=0)
            for name, value in (('precision', precision), ('recall', recall), ('f1_score', f1)):
                metrics[f'{self.average}_{name}'] = 100 * float(value)
        return metrics


def _usable_average(args: Namespace) -> Optional[str]:
    if not args.metrics_avg:
        return None
    try:
        import sklearn  # noqa: F401
    except ImportError:
        _logger.warning('--metrics-avg is left out: it needs scikit-learn (pip install scikit-learn).')
        return None
    return args.metrics_avg


def create_results(
        name: str,
        metrics: Dict[str, float],
        data_config: Dict[str, Any],
        param_count: int,
) -> Dict[str, Any]:
    """Arrange one row under the column names of timm's results."""
    row: Dict[str, Any] = OrderedDict(model=name)
    for metric, value in metrics.items():
        if metric == 'loss':
            continue
        row[metric] = round(value, 4)
        if metric in ('top1', 'top5'):
            row[f'{metric}_err'] = round(100 - value, 4)
    row.update(
        param_count=round(param_count / 1e6, 2),
        img_size=data_config['input_size'][-1],
        crop_pct=data_config['crop_pct'],
        interpolation=data_config['interpolation'],
    )
    return row


def describe_results(row: Dict[str, Any]) -> str:
    """Return a line for the log."""
    if 'map' in row:
        return f" * mAP {row['map']:.3f} F1 micro {row['micro_f1']:.3f} macro {row['macro_f1']:.3f}"
    accuracy = ' * Acc@1 {top1:.3f} ({top1_err:.3f}) Acc@5 {top5:.3f} ({top5_err:.3f})'
    parts = [accuracy.format(**row)] if 'top1' in row else []
    names = [name for name in row if name in PROBE_METRICS or name.endswith(('precision', 'recall', 'f1_score'))]
    return ' | '.join([*parts, *(f'{name} {row[name]:.3f}' for name in names)])
