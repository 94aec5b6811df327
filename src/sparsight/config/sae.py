"""Sparse autoencoders and ReSAE chains."""

import itertools
from dataclasses import dataclass
from typing import Any, Literal

from sparsight.common import sites
from sparsight.common.errors import SparsightError
from sparsight.config.checks import not_negative, positive


@dataclass(frozen=True)
class Sae:
    """A sparse autoencoder and its training, once per seed."""

    backbone: str
    """Name of the backbone whose activations the SAE is trained on."""
    site: str | None = None
    """One of activations.sites, for a single SAE. Give either this or ``sites``."""
    sites: tuple[str, ...] = ()
    """Two or more of activations.sites, in the order of the model: a ReSAE chain, one SAE per site (docs/sae.md)."""
    affine: Literal["full", "diagonal", "identity", "zero"] = "full"
    """Only for ``sites``: the affine map that predicts a site from the previous one; the SAE learns the residual.
    Controls: a ``diagonal`` matrix, the ``identity`` (only the mean shifts), or ``zero`` (no map: plain SAEs)."""
    ridge: float = 1e-3
    """Only for ``sites``: ridge penalty in the fit of the maps, relative to the mean eigenvalue of the earlier site's
    covariance."""
    kind: str = "topk"
    """Name of the variant: a file in src/sparsight/sae/variants."""
    d_sae: int = 768
    """Number of latents."""
    k: int = 16
    """Active latents per activation."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One SAE is trained per seed, named <name>-s<seed>."""
    epochs: int = 50
    """Passes over the stored train split."""
    batch_size: int = 256
    """Activations per step."""
    memory_mb: int = 1024
    """Memory for activations during training, in MB. A store that fits is shuffled as a whole in every epoch. A larger
    store is shuffled in pools of half this size."""
    lr: float | None = None
    """Peak learning rate of Adam on activations scaled to unit variance, with linear decay over the last fifth of
    training. null uses 2e-4 / sqrt(d_sae / 2^14)."""
    aux_k: int = 64
    """Number of dead latents that the AuxK loss revives at a time; 0 turns the loss off."""
    aux_coefficient: float = 1 / 32
    """Weight of the AuxK loss."""
    dead_after: int = 20_000
    """In training, a latent counts as dead after this many activations on which it does not fire."""
    bf16: bool = False
    """Run the matrix products of training's forward pass in bfloat16; weights stay fp32."""
    prototype_weight: float = 0.0
    """PASS: weight of the squared distance between codes and the mean code of their class (arXiv 2506.01247: 0.8).
    Values above 0 use the labels of the train split."""
    experts: int | None = None
    """Only for kind ``switch``: number of experts. With the d_sae of a TopK SAE it is width-matched, with ``experts``
    times that d_sae compute-matched."""
    prefixes: tuple[float, ...] | None = None
    """Only for kind ``matryoshka``: shares of d_sae that must each reconstruct alone, rising to 1."""

    @property
    def places(self) -> tuple[str, ...]:
        """The SAE's site, or the sites of the chain."""
        return self.sites if self.site is None else (self.site,)

    def options(self) -> dict[str, Any]:
        """Arguments of ``sae.create`` other than kind, sizes and seed."""
        names = ("aux_k", "aux_coefficient", "experts", "prefixes")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def __post_init__(self) -> None:
        if (self.site is None) == (not self.sites):
            raise SparsightError("site: give either site (one SAE) or sites (a ReSAE chain)")
        _check_chain(self.sites)
        if self.site is not None and (self.affine, self.ridge) != ("full", 1e-3):
            raise SparsightError("affine: only a chain has maps (affine, ridge); give sites, or leave it out")
        positive(self, "d_sae", "k", "epochs", "batch_size", "memory_mb", *(["lr"] if self.lr is not None else []))
        not_negative(self, "ridge", "prototype_weight")
        for option, kind in (("experts", "switch"), ("prefixes", "matryoshka")):
            if getattr(self, option) is not None and self.kind != kind:
                raise SparsightError(f"{option}: only kind {kind} has it, not {self.kind}; leave it out")
        if self.k > self.d_sae:
            raise SparsightError(
                f"k: {self.k} active latents are more than d_sae = {self.d_sae}; lower k or raise d_sae"
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise SparsightError("seeds: name at least one seed, each once")


def _check_chain(chain: tuple[str, ...]) -> None:
    if chain and (len(chain) < 2 or any(sites.depth(a) >= sites.depth(b) for a, b in itertools.pairwise(chain))):
        raise SparsightError(f"sites: a chain needs two or more sites in the order of the model, got {list(chain)}")
