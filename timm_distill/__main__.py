"""Command `python -m timm_distill`, the same as `timm-distill`."""
import sys

from timm_distill_cli import main

sys.exit(main())
