"""SAEs of SAELens 6: sae_weights.safetensors, with cfg.json beside it, as :mod:`sparsight.sae.saelens` reads them.

The format's traps:

- hook_resid_post of block N is our blocks.N.output, hook_resid_pre is blocks.N.input.
- ``normalize_activations`` other than none is refused: a factor that is not in the file, or statistics of each
  activation. SAELens folds the first kind into the weights (``fold_activation_norm_scaling_factor``).
- ``apply_b_dec_to_input`` and ``rescale_acts_by_decoder_norm`` are folded into the weights.
- A threshold is per latent, also in what SAELens has trained as BatchTopK.
"""

from pathlib import Path

from sparsight.common.errors import SparsightError
from sparsight.sae import saelens
from sparsight.sae.foreign.source import Foreign, settings_beside, site_of


def load(path: Path) -> Foreign:
    """The SAE of a SAELens folder.

    Raises:
        SparsightError: another kind of file, or a setting that has no counterpart here.
    """
    if path.name != "sae_weights.safetensors":
        raise SparsightError(f"{path}: SAELens's weights are called sae_weights.safetensors; name that file")
    settings = settings_beside(path, "cfg.json")
    hook = (settings.get("metadata") or {}).get("hook_name") or settings.get("hook_name")
    return Foreign(saelens.load(path.parent).requires_grad_(False), site_of(path, hook), hook)
