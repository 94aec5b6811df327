"""The configuration: one frozen dataclass per section. Field docstrings become --help and docs/configuration.md."""

from sparsight.config.activations import Activations
from sparsight.config.attribution import Attribution
from sparsight.config.backbone import Backbone
from sparsight.config.compute import Compute
from sparsight.config.disentangle import Disentangle
from sparsight.config.images import Images
from sparsight.config.pruning import Policy, Pruning, Strategy
from sparsight.config.report import Report
from sparsight.config.sae import Evaluation, Sae
from sparsight.config.spurious import Spurious
from sparsight.config.steering import Steering

__all__ = [
    "Activations", "Attribution", "Backbone", "Compute", "Disentangle", "Evaluation", "Images", "Policy", "Pruning",
    "Report", "Sae", "Spurious", "Steering", "Strategy",
]  # fmt: skip
