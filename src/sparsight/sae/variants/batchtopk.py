"""BatchTopK SAE (Bussmann et al. 2024, arXiv 2412.06410, equations 5 to 7).

In training the B * K largest of the batch's ReLU((x - b_dec) W_enc + b_enc) are kept, so K is an average. At
inference a latent is active above a threshold: the mean over batches of the least value kept. The threshold
follows training as an exponential mean; until there is one, encoding selects as in training.

Shapes: B batch, K active latents (k).
"""

from sparsight.sae.base import variant
from sparsight.sae.batch_selection import BatchSelection


@variant
class BatchTopK(BatchSelection):
    """K active latents on average, more for an activation that needs more."""
