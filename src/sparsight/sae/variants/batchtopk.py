"""BatchTopK SAE (Bussmann et al. 2024, arXiv 2412.06410, equations 5 to 7).

Training keeps the B * K largest of the batch's ReLU((x - b_dec) W_enc + b_enc), so K is an average. At inference a
latent is active above a threshold, the mean over batches of the smallest value kept. The threshold is an exponential
mean, updated in training. Until it exists, encoding selects as in training.

Shapes: B batch, K active latents (k).
"""

from sparsight.sae.base import variant
from sparsight.sae.batch_selection import BatchSelection


@variant
class BatchTopK(BatchSelection):
    """K active latents on average; an activation can have more or fewer."""
