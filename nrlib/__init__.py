"""Neutral residues: teach a pretrained language model a new domain without losing the old one (arXiv 2410.02744).

Importing nrlib registers the method with PEFT, so that `get_peft_model` and `PeftModel.from_pretrained` know it.
"""

import os

# Before torch is imported: threads that wait actively starve each other on a busy machine, where a small model then takes
# twenty times as long and more.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from .adapter import GatedAdapter
from .config import RunConfig, make_config
from .losses import IGNORED, NEW, ORIGINAL, LocalLoss
from .peft_method import NeutralResiduesConfig, NeutralResiduesLayer, NeutralResiduesModel
from .trainer import LocalLossMixin
from .upload import push_to_hub

__version__ = "0.1.0"
__all__ = [
    "IGNORED",
    "NEW",
    "ORIGINAL",
    "GatedAdapter",
    "LocalLoss",
    "LocalLossMixin",
    "NeutralResiduesConfig",
    "NeutralResiduesLayer",
    "NeutralResiduesModel",
    "RunConfig",
    "make_config",
    "push_to_hub",
]
