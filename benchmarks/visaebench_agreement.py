"""Whether sparsight and visaebench 0.1.0 score the same SAE alike.

    uv run --with visaebench==0.1.0 python benchmarks/visaebench_agreement.py results/default topk-s0

Monosemanticity (both after Pach et al. 2025) of a TopK SAE of one token per image, on the test split of a finished run.
visaebench looks at the top_k_images strongest images of a latent (16 by default); here at all of them, as the paper and
sparsight do. It gets the weights in its own format, the stored activations, and the stored embeddings in place of those
of its evaluator model. The line with 16 images shows what that choice changes.

Shapes: N images, F latents (d_sae), E width of the embedding.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from visaebench.hub.loader import load_sae_from_weights
from visaebench.metrics.concept_detection.monosemanticity import MonosemanticityScore

from sparsight.activations.store import ActivationStore
from sparsight.common import tables
from sparsight.sae.base import SAE, load


class _Stored:
    """What visaebench asks of a backbone; an image is its number, and its only patch the stored embedding."""

    def __init__(self, embedding_NE: np.ndarray) -> None:
        self.embedding = torch.from_numpy(embedding_NE.astype(np.float32))

    def extract_activations(self, images: list[int], layer: int) -> Tensor:
        return self.embedding[images].unsqueeze(1)


def main() -> None:
    """Print both scores, and the largest difference of a latent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run, e.g. results/default")
    parser.add_argument("sae", help="a TopK SAE of one token per image, e.g. topk-s0")
    arguments = parser.parse_args()
    folder = arguments.run / "saes" / arguments.sae
    sae = load(folder).requires_grad_(False)
    store = ActivationStore.open(arguments.run / "activations" / sae.about["backbone"] / "test.json")
    rows = store.rows(sae.about["site"], sae.about["tokens"])
    assert sae.kind == "topk" and rows.tokens_per_image == 1, "give a TopK SAE of one token per image"
    x, embedding = torch.from_numpy(rows[:]).float(), store.rows("embedding")[:]
    ours = np.array([row["monosemanticity"] for row in tables.read(folder / "latents.parquet")])
    print(f"{arguments.sae}: {len(x):,} images, {sae.d_sae} latents, {np.isfinite(ours).sum()} with a score")
    print(f"  sparsight                      {np.nanmean(ours):.6f}")
    for n_images in (len(x), 16):
        metric = MonosemanticityScore(top_k_images=n_images, max_features=sae.d_sae)
        score = metric.compute(
            _theirs(sae), x, device="cpu", images=range(len(x)), evaluator_backbone=_Stored(embedding)
        )
        of_latents = np.array(score.metadata["ms_distribution"])
        print(f"  visaebench, {n_images:>6,} images     {score.value:.6f}  ({len(of_latents)} latents)")
        if n_images == len(x):
            largest = np.abs(of_latents - ours[np.isfinite(ours)]).max()
            print(f"  largest difference of a latent {largest:.1e}")
            assert abs(score.value - np.nanmean(ours)) < 1e-3, "the two do not agree"


def _theirs(sae: SAE) -> torch.nn.Module:
    """The same SAE in visaebench's format, whose encoder does not subtract the decoder's bias."""
    weights = {
        "encoder.weight": sae.W_enc.T.contiguous(),
        "encoder.bias": sae.b_enc - sae.b_dec @ sae.W_enc,
        "decoder.weight": sae.W_dec,
        "decoder.bias": sae.b_dec,
    }
    return load_sae_from_weights(weights, {"activation": "topk", "k": sae.k}, device="cpu")


if __name__ == "__main__":
    main()
