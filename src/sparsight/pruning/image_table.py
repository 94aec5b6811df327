"""What decides the last block's heads of each test image, and what every mask predicts: ``test_images.safetensors``.

With it the masks and predictions of any amplification of latents follow without the model: the head logits are
logits + W_head W_dec ((g - 1) z), a head is kept where its logit is above zero, and the mask's code is the column of
the prediction. The report's sliders work like this.

Shapes: N images, H heads, K active latents (padded to the most), M masks.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from sparsight.pruning.last_block import LastBlockInputs
from sparsight.pruning.latent_effects import LatentEffects

MASKS = 4096  # largest table of predictions by mask, per image
_BYTES = 2**27  # of arrays, with predictions of 32 bits; of more images, the first are written


def write(inputs: LastBlockInputs, effects_by_sae: Mapping[str, LatentEffects], path: Path) -> None:
    """Write the arrays of the first images of a split.

    * ``head_logits``: float32 (N, H), the unsteered policy's logits for the last block;
    * ``predictions``: uint16 (N, M), the class under each mask by its code (bit h: head h is kept), if these are
      tabulated (:attr:`LastBlockInputs.tabulated`) for at most ``MASKS`` masks;
    * by SAE, ``<sae>.latents`` int32 and ``<sae>.codes`` float32, (N, K): its active latents on what the policy reads,
      the strongest first, and -1 and 0 after them.
    """
    arrays = {"head_logits": inputs.logits_NH.cpu().numpy()}
    if inputs.table is not None and inputs.table.shape[1] <= MASKS:
        arrays["predictions"] = inputs.table
    for name, effects in effects_by_sae.items():
        z_NF = effects.encode(inputs.read_ND)
        most = max(1, int((z_NF > 0).sum(dim=1).max()))
        codes, latents = (part.cpu().numpy() for part in torch.topk(z_NF, most, dim=1))
        arrays[f"{name}.codes"] = codes
        arrays[f"{name}.latents"] = np.where(codes > 0, latents, -1).astype(np.int32)
    n = max(1, _BYTES // sum(array[0].nbytes for array in arrays.values()))
    written = {name: np.ascontiguousarray(array[:n]) for name, array in arrays.items()}
    if "predictions" in written:
        written["predictions"] = written["predictions"].astype(np.uint16)
    save_file(written, path)
