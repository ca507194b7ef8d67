"""Networks that timm lacks, registered in timm: importing the package makes `timm.create_model` know them."""
from .cifar import CifarNet

__all__ = ['CifarNet']
