"""The configuration: one frozen dataclass per stage.

A stage sees its own section alone, so a change elsewhere never makes it stale. The docstring under a
field is its documentation everywhere (``--help`` of the stage scripts, the tables in docs).
"""

from sparsight.config.analysis import Policy, Pruning, Report, Sae, Steering, Strategy
from sparsight.config.inputs import Activations, Backbone, Compute, Images

__all__ = [
    "Activations", "Backbone", "Compute", "Images", "Policy", "Pruning", "Report", "Sae", "Steering", "Strategy",
]  # fmt: skip
