"""Data of a study: what is there against what the plan says, and folders with a part of the labels."""
import os
import random
from pathlib import Path

from study_parts import Plan

from timm_distill import UsageError


def link_part(data_dir: str, part: float, seed: int, target: str) -> None:
    """Write a folder of links to a part of the training images, drawn class by class, and to the validation images.

    A folder that is there is taken as it is.

    Args:
        data_dir: Class folders, train and validation.
        part: Share of each class's images, at least one of each.
        seed: Of the draw.
        target: Folder to write.
    """
    if os.path.isdir(target):
        return
    source, temporary = Path(data_dir).resolve(), Path(f'{target}.{os.getpid()}.tmp')
    for folder in sorted(path for path in (source / 'train').iterdir() if path.is_dir()):
        images = sorted(path for path in folder.iterdir() if path.is_file())
        linked = temporary / 'train' / folder.name
        linked.mkdir(parents=True)
        for image in random.Random(f'{seed} {folder.name}').sample(images, max(1, round(part * len(images)))):
            (linked / image.name).symlink_to(image)
    (temporary / 'validation').symlink_to(source / 'validation')
    os.rename(temporary, target)


def check_data(plan: Plan) -> None:
    """Compare the folders with what the plan says of them.

    Raises:
        UsageError: If data or given weights are missing, or other data is there.
    """
    hint = f' {plan.data_about}' if plan.data_about else ''
    for split, expected in (('train', plan.train_images), ('validation', plan.validation_images)):
        folder = os.path.join(plan.data_dir, split)
        if not os.path.isdir(folder):
            raise UsageError(f'The data of {plan.name} is not in {folder} (--data-root).{hint}')
        classes = [entry.path for entry in os.scandir(folder) if entry.is_dir()]
        if len(classes) != plan.classes:
            raise UsageError(f'{folder} has {len(classes)} class folders, the plan says {plan.classes}.{hint}')
        images = sum(len(files) for path in classes for _, _, files in os.walk(path))
        if images != expected:
            raise UsageError(f'{folder} has {images} files, the plan says {expected}.{hint}')
    wanted = [teacher.checkpoint for teacher in plan.teachers.values() if not teacher.trained]
    wanted += [
        str(teacher.flags['pretrained-path']) for teacher in plan.teachers.values()
        if teacher.flags and teacher.flags.get('pretrained-path')]
    missing = [file for file in wanted if not os.path.isfile(file)]
    if missing:
        raise UsageError(f'The weights {missing[0]} are missing: benchmarks/pretrained.py writes them (--data-root).')
