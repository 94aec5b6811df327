"""TopK training steps of sparsight, of its peers on PyPI and of plain PyTorch, behind one interface.

Every contestant starts from the same weights (decoder rows of unit norm, encoder their transpose, biases zero) and
does in a step what its own training loop does: the peers differ in whether they clip, remove the gradient parallel
to the decoder rows, count dead latents and renormalise. All optimise with fused Adam at the same learning rate. They
train where the first decoder rows lie.

Shapes: B batch, D width (d_in), F latents (d_sae), K active latents (k).
"""

import os
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

import sparsight as ss

LR = 3e-4
MANY_STEPS = 10**6


class Contestant(Protocol):
    """One model in training."""

    def step(self, x: Tensor) -> None:
        """One whole training step on (B, D)."""
        ...

    def gradients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the loss, whatever its scale, to the encoder and to the decoder, (F, D) both."""
        ...

    def weights(self) -> list[Tensor]:
        """All parameters."""
        ...


class Sparsight:
    """Our own step, by the public interface."""

    def __init__(self, rows_FD: Tensor, k: int) -> None:
        self.sae = ss.sae.create("topk", rows_FD.shape[1], len(rows_FD), k).to(rows_FD.device)
        with torch.no_grad():
            self.sae.W_dec.copy_(rows_FD)
            self.sae.W_enc.copy_(rows_FD.T)
        self.trainer = ss.sae.Trainer([self.sae], lr=LR)

    def step(self, x: Tensor) -> None:
        self.trainer.step(x)

    def gradients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.sae.zero_grad()
        self.sae.loss(x).total.backward()
        return _grad(self.sae.W_enc).T, _grad(self.sae.W_dec)

    def weights(self) -> list[Tensor]:
        return list(self.sae.parameters())


class Dense:
    """Plain PyTorch: what one writes first, with all that our step does."""

    def __init__(self, rows_FD: Tensor, k: int) -> None:
        self.k = k
        self.W_enc = rows_FD.T.contiguous().requires_grad_()
        self.W_dec = rows_FD.clone().requires_grad_()
        self.b_enc = torch.zeros(len(rows_FD), device=rows_FD.device, requires_grad=True)
        self.b_dec = torch.zeros(rows_FD.shape[1], device=rows_FD.device, requires_grad=True)
        self.optimizer = torch.optim.Adam(self.weights(), lr=LR, fused=True)
        self.since_fired = torch.zeros(len(rows_FD), dtype=torch.int64, device=rows_FD.device)

    def _backward(self, x: Tensor) -> Tensor:
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        values, indices = pre.topk(self.k, dim=1, sorted=False)
        z = torch.zeros_like(pre).scatter(1, indices, values.relu())
        (x - z @ self.W_dec - self.b_dec).square().sum(dim=1).mean().backward()
        return z

    def step(self, x: Tensor) -> None:
        self.optimizer.zero_grad()
        z = self._backward(x)
        with torch.no_grad():
            gradient = _grad(self.W_dec)
            gradient -= (gradient * self.W_dec).sum(dim=1, keepdim=True) * self.W_dec
            torch.nn.utils.clip_grad_norm_(self.weights(), 1.0)
            self.optimizer.step()
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
            self.since_fired += len(x)
            self.since_fired[z.any(dim=0)] = 0

    def gradients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad()
        self._backward(x)
        return _grad(self.W_enc).T, _grad(self.W_dec)

    def weights(self) -> list[Tensor]:
        return [self.W_enc, self.b_enc, self.W_dec, self.b_dec]


class EaiSparsify:
    """eai-sparsify: the body of sparsify.trainer.Trainer.fit, which does not clip."""

    def __init__(self, rows_FD: Tensor, k: int) -> None:
        if not rows_FD.is_cuda:
            os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
        from sparsify import SparseCoder, SparseCoderConfig

        self.sae: Any = SparseCoder(rows_FD.shape[1], SparseCoderConfig(num_latents=len(rows_FD), k=k)).to(
            rows_FD.device
        )
        with torch.no_grad():
            self.sae.encoder.weight.copy_(rows_FD)
            self.sae.W_dec.copy_(rows_FD)
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=LR, fused=True)
        self.since_fired = torch.zeros(len(rows_FD), dtype=torch.int64, device=rows_FD.device)

    def step(self, x: Tensor) -> None:
        self.sae.set_decoder_norm_to_unit_norm()
        fired = torch.zeros_like(self.since_fired, dtype=torch.bool)
        out = self.sae(x, dead_mask=self.since_fired > 10_000_000)
        fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.since_fired += len(x)
        self.since_fired[fired] = 0

    def gradients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad()
        self.sae(x).fvu.backward()
        return _grad(self.sae.encoder.weight), _grad(self.sae.W_dec)

    def weights(self) -> list[Tensor]:
        return list(self.sae.parameters())


class SAELens:
    """sae-lens: the body of sae_lens.training.sae_trainer.SAETrainer._train_step."""

    def __init__(self, rows_FD: Tensor, k: int) -> None:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

        config = TopKTrainingSAEConfig(
            d_in=rows_FD.shape[1], d_sae=len(rows_FD), k=k, rescale_acts_by_decoder_norm=False,
            device=str(rows_FD.device),
        )  # fmt: skip
        self.sae: Any = TopKTrainingSAE(config).to(rows_FD.device)
        with torch.no_grad():
            self.sae.W_enc.copy_(rows_FD.T)
            self.sae.W_dec.copy_(rows_FD)
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=LR, fused=True)
        self.since_fired = torch.zeros(len(rows_FD), device=rows_FD.device)

    def _forward(self, x: Tensor) -> Any:
        from sae_lens.saes.sae import TrainStepInput

        dead = self.since_fired > 1000
        return self.sae.training_forward_pass(
            TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=1, is_logging_step=False)
        )

    def step(self, x: Tensor) -> None:
        out = self._forward(x)
        with torch.no_grad():
            fired = out.feature_acts.bool().float().sum(-2).bool()
            self.since_fired += 1
            self.since_fired[fired] = 0
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad()
        self._forward(x).loss.backward()
        return _grad(self.sae.W_enc).T, _grad(self.sae.W_dec)

    def weights(self) -> list[Tensor]:
        return list(self.sae.parameters())


class DictionaryLearning:
    """dictionary-learning: TopKTrainer.update, its Adam switched to fused."""

    def __init__(self, rows_FD: Tensor, k: int) -> None:
        from dictionary_learning.trainers.top_k import TopKTrainer

        self.trainer: Any = TopKTrainer(
            steps=MANY_STEPS, activation_dim=rows_FD.shape[1], dict_size=len(rows_FD), k=k, layer=0, lm_name="x",
            lr=LR, device=str(rows_FD.device), warmup_steps=1,
        )  # fmt: skip
        with torch.no_grad():
            self.trainer.ae.encoder.weight.copy_(rows_FD)
            self.trainer.ae.decoder.weight.copy_(rows_FD.T)
        self.trainer.optimizer.param_groups[0]["fused"] = True

    def step(self, x: Tensor) -> None:
        self.trainer.update(1, x)  # step 0 would set b_dec to the geometric median

    def gradients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.trainer.optimizer.zero_grad()
        self.trainer.loss(x, step=1).backward()
        return _grad(self.trainer.ae.encoder.weight), _grad(self.trainer.ae.decoder.weight).T

    def weights(self) -> list[Tensor]:
        return list(self.trainer.ae.parameters())


class Overcomplete:
    """overcomplete: train_sae over one batch, without its logging."""

    def __init__(self, rows_FD: Tensor, k: int) -> None:
        import matplotlib

        if not hasattr(matplotlib.cm, "get_cmap"):  # gone since matplotlib 3.9, still imported by overcomplete 0.3
            matplotlib.cm.get_cmap = lambda name: matplotlib.colormaps[name]  # type: ignore[attr-defined]
        from overcomplete.sae import TopKSAE, train_sae

        self.train: Callable[..., Any] = train_sae
        self.sae: Any = TopKSAE(rows_FD.shape[1], nb_concepts=len(rows_FD), top_k=k)
        with torch.no_grad():
            self.sae.encoder.final_block[0].weight.copy_(rows_FD)
            self.sae.encoder.final_block[0].bias.zero_()
            self.sae.dictionary._weights.copy_(rows_FD)
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=LR, fused=True)

    def step(self, x: Tensor) -> None:
        self.train(self.sae, [x], _squared_error, self.optimizer, nb_epochs=1, monitoring=0, device="cpu")

    def gradients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad()
        pre, z, x_hat = self.sae(x)
        _squared_error(x, x_hat, pre, z, self.sae.dictionary).backward()
        return _grad(self.sae.encoder.final_block[0].weight), _grad(self.sae.dictionary._weights)

    def weights(self) -> list[Tensor]:
        return list(self.sae.parameters())


def _squared_error(x: Tensor, x_hat: Tensor, _pre: Tensor, _z: Tensor, _dictionary: Any) -> Tensor:
    return (x - x_hat).square().sum(dim=1).mean()


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


CONTESTANTS: dict[str, Callable[[Tensor, int], Contestant]] = {
    "sparsight": Sparsight,
    "eai-sparsify": EaiSparsify,
    "sae-lens": SAELens,
    "dictionary-learning": DictionaryLearning,
    "overcomplete": Overcomplete,
    "dense PyTorch": Dense,
}
