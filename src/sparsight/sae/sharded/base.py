"""A part of an SAE: every rank holds some of its logical shards, and all ranks see the same batch.

A shard has F / S consecutive latents: their rows of the decoder, columns of the encoder and biases. It selects the k
largest pre-activations among its own latents; a tree over the shards leaves the k largest of all (:mod:`.operators`).
Each shard then decodes its own, and the sum over the shards is the reconstruction. Codes, reconstruction, losses and
b_dec are the same on every rank, so the gradients of a shard's weights need no other rank.

Shapes: B batch, D width (d_in), F latents (d_sae), S shards, P latents of a shard, K active latents (k).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsight import kernels
from sparsight.common.errors import SparsightError
from sparsight.config.sae import SHARDS
from sparsight.sae.base import SAE
from sparsight.sae.codes import Codes, SparseCodes
from sparsight.sae.sharded.operators import copies, total
from sparsight.sae.sharded.weights import WeightsFile, unit_rows
from sparsight.training.ranks import Parts, Ranks

Encoder = tuple[Tensor, Tensor | None]
"""W_enc (D, P) and b_enc (P,), or None."""


class Shard(nn.Module):
    """The parameters of P latents; see :class:`sparsight.sae.base.SAE`."""

    def __init__(self, rows_PD: Tensor, has_b_enc: bool) -> None:
        super().__init__()
        self.W_dec = nn.Parameter(rows_PD)
        self.W_enc = nn.Parameter(rows_PD.clone().T)
        self.b_enc = nn.Parameter(torch.zeros(len(rows_PD))) if has_b_enc else None


class Sharded(SAE):
    """What replaces, in a variant that selects latents, all that reads weights of latents.

    Args:
        sizes: d_in, d_sae, k, seed, as for the variant.
        ranks: the processes that hold the SAE together.
        options: those of the variant.

    Raises:
        SparsightError: a d_sae that the shards do not divide.
    """

    def __init__(self, *sizes: int, ranks: Ranks, **options: Any) -> None:
        self.ranks = ranks
        super().__init__(*sizes, **options)

    def _make_weights(self, seed: int) -> None:
        if self.d_sae % SHARDS:
            raise SparsightError(f"d_sae: {self.d_sae} latents are not a multiple of {SHARDS} shards")
        self.width = self.d_sae // SHARDS
        own = self.ranks.own
        rows = unit_rows(self.d_sae, self.d_in, seed, own.start * self.width, own.stop * self.width)
        # Memory of its own for each shard: its place within a larger array could change how sums are rounded.
        shards = {str(n): Shard(r.clone(), self.has_b_enc) for n, r in zip(own, rows.split(self.width), strict=True)}
        self.shards = nn.ModuleDict(shards)

    @property
    def own(self) -> Iterable[tuple[int, Shard]]:
        """Number and parameters of every own shard."""
        return zip(self.ranks.own, self.shards.values(), strict=True)  # type: ignore[arg-type]

    @property
    def W_dec(self) -> Tensor:  # type: ignore[override]
        """The decoder of one shard, whose device and type all have."""
        return next(iter(self.own))[1].W_dec

    def _topk(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return self._largest_of(x, [(shard.W_enc, shard.b_enc) for _, shard in self.own], k)

    def _largest_of(self, x: Tensor, encoders: Sequence[Encoder], k: int) -> tuple[Tensor, Tensor]:
        """:meth:`_topk` with these encoders in place of the own shards'. Index P s + i is column i of shard s.

        On every rank all values are known, but gradients reach the weights only from those of its own shards.
        """
        centered = [x - b_dec for b_dec in copies(self.ranks, self.b_dec)]
        with torch.no_grad():
            candidates = [
                self._candidates(n, rows, encoder, k)
                for n, rows, encoder in zip(self.ranks.own, centered, encoders, strict=True)
            ]
            pre, indices = self.ranks.tree(candidates, lambda a, b: _largest(a, b, k))
            indices = indices.long()
            first, last = (self.width * n for n in (self.ranks.own.start, self.ranks.own.stop))
            values = pre.relu() * ((indices < first) | (indices >= last))
        for n, rows, (W, b) in zip(self.ranks.own, centered, encoders, strict=True):
            values = values + kernels.chosen(rows, W, b, *self._of_shard(n, pre, indices))
        return values, indices

    def _candidates(self, n: int, centered: Tensor, encoder: Encoder, k: int) -> Parts:
        """Pre-activations and int32 indices, (B, min(k, P)) both; what is missing has a pre-activation of -inf."""
        W, b = encoder
        k = min(k, self.width)
        found, columns = kernels.select(centered, W, b, min(k, W.shape[1]))
        missing = (0, k - found.shape[1])
        if missing[1]:
            found = torch.nn.functional.pad(found, missing, value=-torch.inf)
            columns = torch.nn.functional.pad(columns, missing)
        return found, (columns + n * self.width).int()

    def _of_shard(self, n: int, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The entries of a shard's latents, numbered from 0; 0 in place of the others."""
        columns = indices - n * self.width
        own = (columns >= 0) & (columns < self.width)
        return torch.where(own, values, 0), torch.where(own, columns, 0)

    def _combine(self, values_BK: Tensor, indices_BK: Tensor) -> Tensor:
        return self._decoded(values_BK, indices_BK, self._decoders())

    def _decoded(self, values: Tensor, indices: Tensor, decoders: list[Tensor]) -> Tensor:
        """:meth:`_combine` with these decoders in place of the own shards'."""
        own = zip(self.ranks.own, decoders, strict=True)
        return total(self.ranks, [kernels.decode(*self._of_shard(n, values, indices), W) for n, W in own])

    def decode(self, codes: Codes) -> Tensor:
        assert isinstance(codes, SparseCodes)
        return self._combine(codes.values, codes.indices) + self.b_dec

    def _from_dead(self, x: Tensor, dead: Tensor | None) -> Tensor:
        assert dead is not None, "a part of an SAE does not take the step for a GPU"
        encoders: list[tuple[Tensor, Tensor]] = []
        decoders: list[Tensor] = []
        for n, shard in self.own:
            assert shard.b_enc is not None
            columns = dead[dead // self.width == n] - n * self.width
            if len(columns):
                bias = shard.b_enc[columns]
            else:  # one that never fires, so that all ranks compute, and wait for each other, alike
                columns, bias = columns.new_zeros(1), shard.b_enc.new_full((1,), -torch.inf)
            encoders.append((shard.W_enc.T.index_select(0, columns).T, bias))
            decoders.append(shard.W_dec.index_select(0, columns))
        if len(dead) <= self.aux_k:
            centers = copies(self.ranks, self.b_dec)
            codes = [torch.addmm(b, x - center, W).relu() for center, (W, b) in zip(centers, encoders, strict=True)]
            return total(self.ranks, [z @ W for z, W in zip(codes, decoders, strict=True)])
        values, indices = self._largest_of(x, encoders, self.aux_k)
        return self._decoded(values, indices, decoders)

    def _decoders(self) -> list[Tensor]:
        return [shard.W_dec for _, shard in self.own]

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        for name in self.scaled:
            owners = [shard for _, shard in self.own] if name == "b_enc" else [self]
            for owner in owners:
                getattr(owner, name).mul_(scale)

    def save(self, folder: str | Path, **about: Any) -> None:
        """As the whole SAE would be saved; every rank writes what it holds. All ranks must call this."""
        folder = Path(folder)
        common = {name: value for name, value in self.state_dict().items() if not name.startswith("shards.")}
        F, D = self.d_sae, self.d_in
        shapes = {"W_dec": (F, D), "W_enc": (D, F), **({"b_enc": (F,)} if self.has_b_enc else {})}
        file = WeightsFile(folder / "sae.safetensors", shapes | {n: tuple(v.shape) for n, v in common.items()})
        if self.ranks.first:
            folder.mkdir(parents=True, exist_ok=True)
            file.create()
            for name, value in common.items():
                file.write(name, value.reshape(1, -1))
            self._save_config(folder, about)
        self.ranks.wait()
        for n, shard in self.own:
            first = n * self.width
            file.write("W_dec", shard.W_dec.reshape(1, -1), first * D)
            file.write("W_enc", shard.W_enc, first, F)
            if shard.b_enc is not None:
                file.write("b_enc", shard.b_enc.reshape(1, -1), first)
        self.ranks.wait()


def _largest(a: Parts, b: Parts, k: int) -> Parts:
    """Of two selections, the k largest of each row, or all if there are not so many."""
    pre, indices = (torch.cat(both, dim=1) for both in zip(a, b, strict=True))
    best, places = pre.topk(min(k, pre.shape[1]), dim=1, sorted=False)
    return best, indices.gather(1, places)
