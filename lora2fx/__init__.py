"""lora2fx: an adapter compiler for PyTorch.

Finds the matmuls you mean, rewrites them into prunable low-rank updates, trains, prunes, folds and exports them.
"""

from __future__ import annotations

from importlib.metadata import version as _version

from lora2fx import exporters
from lora2fx.attachment import attach, param_groups
from lora2fx.compiler import transform
from lora2fx.errors import Lora2fxError, Lora2fxWarning
from lora2fx.folding import fold, unload
from lora2fx.inspection import inspect_model as inspect
from lora2fx.inspection import print_trainable_parameters
from lora2fx.inspection import report_model as report
from lora2fx.methods.adalora import AdaLoRA
from lora2fx.methods.alora import ALoRA
from lora2fx.methods.lora import LoRA
from lora2fx.methods.lora2 import LoRA2
from lora2fx.methods.salora import SaLoRA
from lora2fx.methods.sora import SoRA
from lora2fx.storage import load, save

__version__ = _version("lora2fx")

__all__ = [
    "ALoRA",
    "AdaLoRA",
    "LoRA",
    "LoRA2",
    "Lora2fxError",
    "Lora2fxWarning",
    "SaLoRA",
    "SoRA",
    "attach",
    "exporters",
    "fold",
    "inspect",
    "load",
    "param_groups",
    "print_trainable_parameters",
    "report",
    "save",
    "transform",
    "unload",
]
