"""The README of a released student: what it is, where it comes from, how to load it."""
from typing import Any, Dict, List, Mapping, Optional

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..utils.text import format_fact

_USAGE = '''```python
import timm
import torch
from PIL import Image

model = timm.create_model({source!r}, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model), is_training=False)
with torch.no_grad():
    {output} = model(transform(Image.open('image.jpg').convert('RGB')).unsqueeze(0)){map}
```'''
_OUTPUTS = {
    False: {'output': 'probabilities', 'map': '.softmax(dim=1)'},
    True: {'output': 'features', 'map': '  # num_classes=N adds a classifier'},
}
_SECTIONS = (
    ('Teacher', 'teacher'),
    ('Training', 'training'),
    ('Data', 'data'),
    ('Metrics', 'metrics'),
    ('Versions', 'versions'),
)
_TASK = 'image-classification'
_FEATURES = 'image-feature-extraction'
# How the hub calls the metrics of validation.
_HUB_METRICS = {
    'top1': ('accuracy', 'Top-1 accuracy, %'),
    'top5': ('accuracy', 'Top-5 accuracy, %'),
    'map': ('map', 'Mean average precision, %'),
    'loss': ('loss', 'Loss'),
}


def create_model_card(
        architecture: str,
        provenance: Mapping[str, Any],
        data_config: Mapping[str, Any],
        ema: bool = False,
        repo_id: Optional[str] = None,
        load: str = '',
        headless: bool = False,
) -> ModelCard:
    """Return a model card of the hub; `str()` of it is Markdown with front matter.

    Args:
        architecture: timm name.
        provenance: What `collect_provenance` noted during training; missing entries are left out.
        data_config: Input size, normalisation and crop.
        ema: Whether the weights are averaged ones.
        repo_id: Where it will be loaded from on the hub.
        load: Python that builds and loads it, where timm does not.
        headless: Whether it gives features, no logits.
    """
    name = provenance.get('teacher', {}).get('name')
    teacher = ' and '.join(name.values()) if isinstance(name, Mapping) else name
    source = f'hf-hub:{repo_id}' if repo_id else 'local-dir:THIS_FOLDER'
    lines = [
        f'# {architecture}' + (f' distilled from {teacher}' if teacher else ''), '',
        _describe(architecture, provenance, ema, 'timm ' if not load else ''), '',
        '## Use', '', f'```python\nimport safetensors.torch\n{load}\n```' if load else _USAGE.format(
            source=source, **_OUTPUTS[headless]), '',
        '## Input', '', *_items(_input_facts(data_config)), '',
    ]
    for title, key in _SECTIONS:
        facts = provenance.get(key)
        if facts:
            lines += [f'## {title}', '', *_items(facts), '']
    text = '\n'.join(lines)
    metadata = _metadata(architecture, provenance, 'pytorch' if load else 'timm', headless)
    return ModelCard(f'---\n{metadata.to_yaml()}\n---\n\n{text}')


def _metadata(
        architecture: str,
        provenance: Mapping[str, Any],
        library: str,
        headless: bool = False,
) -> ModelCardData:
    """Return the front matter, with what was measured as the hub's model-index."""
    task = _FEATURES if headless else _TASK
    dataset = str(provenance.get('data', {}).get('name') or 'unknown')
    results = []
    for name, value in provenance.get('metrics', {}).items():
        key = name.rpartition(' ')[2]
        if name.startswith('validation ') and isinstance(value, (int, float)):
            kind, title = _HUB_METRICS.get(key, (key, key))
            results.append(EvalResult(
                task_type=task,
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split='validation',
                metric_type=kind,
                metric_name=title,
                metric_value=round(float(value), 4),
            ))
    return ModelCardData(
        tags=[task, library, 'knowledge-distillation'],
        pipeline_tag=task,
        library_name=library,
        model_name=architecture if results else None,
        eval_results=results or None,
    )


def _describe(architecture: str, provenance: Mapping[str, Any], ema: bool, library: str) -> str:
    kd = provenance.get('training', {}).get('kd', 'none')
    how = 'trained without a teacher' if kd == 'none' else f'trained by knowledge distillation (`{kd}`)'
    weights = 'an average of the weights over training (EMA)' if ema else 'the weights as trained'
    return (
        f'A plain {library}`{architecture}`, {how} with timm_distill: nothing of the distillation is left in it, '
        f'neither parameters nor code. The file holds {weights}.')


def _input_facts(data_config: Mapping[str, Any]) -> Dict[str, Any]:
    names = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
    facts = {name: data_config[name] for name in names if data_config.get(name) is not None}
    if 'input_size' in facts:
        facts['input_size'] = ' x '.join(map(str, facts['input_size']))
    return facts


def _items(facts: Mapping[str, Any]) -> List[str]:
    return [f'- **{name}:** {format_fact(value)}' for name, value in facts.items() if value not in (None, '', {}, [])]
