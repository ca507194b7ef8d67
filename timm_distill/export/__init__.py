"""Release of a trained student: plain timm weights, a folder in the hub's format, ONNX.

    python -m timm_distill.export output/train/RUN/model_best.pth.tar --output released

Methods, teachers and tasks are unknown here.
"""
from .release import Release, export_hub, export_onnx, export_weights, load_release, push_to_hub

__all__ = ['Release', 'export_hub', 'export_onnx', 'export_weights', 'load_release', 'push_to_hub']
