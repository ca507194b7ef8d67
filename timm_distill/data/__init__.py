"""Datasets, loaders, mixup and the label loss, as timm builds them.

Takes the parsed arguments read-only and knows neither the parser nor models. On top of timm: mistakes in a folder of
images (missing split, shifted labels, unreadable file) stop the run with one line that says what to change, where
timm would go on with other data than the user meant.
"""
from .classes import class_names, known_names, label_names
from .datasets import create_datasets, create_eval_dataset, find_missing_labels, read_class_names
from .fingerprint import class_indices, describe_changes, digest_fingerprint, fingerprint_dataset
from .images import StrictImageDataset, user_message
from .indexing import IndexedDataset, index_samples, read_labels
from .loaders import DataLoaders, create_eval_loader, create_loaders, create_pass_loader, set_loader_epoch
from .mixup import is_mixup_active
from .targets import create_train_loss

__all__ = [
    'DataLoaders',
    'IndexedDataset',
    'StrictImageDataset',
    'class_indices',
    'class_names',
    'create_datasets',
    'create_eval_dataset',
    'create_eval_loader',
    'create_loaders',
    'create_pass_loader',
    'create_train_loss',
    'describe_changes',
    'digest_fingerprint',
    'find_missing_labels',
    'fingerprint_dataset',
    'index_samples',
    'is_mixup_active',
    'known_names',
    'label_names',
    'read_class_names',
    'read_labels',
    'set_loader_epoch',
    'user_message',
]
