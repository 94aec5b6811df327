"""What an SAE is worth on held-out activations and inside the model, beside controls.

Shapes: B batch, N rows, T tokens, D width (d_in), F latents (d_sae).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsight import sites
from sparsight.backbones import Backbone
from sparsight.images import Split
from sparsight.progress import say
from sparsight.sae.base import SAE
from sparsight.statistics import paired, wilson
from sparsight.store import ActivationStore
from sparsight.work import Work, write_json

_ROWS = 4096
_IMAGES = 125


def evaluate(
    sae: SAE, backbone: Backbone, train: ActivationStore, test: ActivationStore, split: Split,
    work: Work, record: dict[str, Any],
) -> None:  # fmt: skip
    """Write ``metrics.json``: :func:`reconstruction_metrics` and :func:`spliced_accuracy`.

    Args:
        train: store of the train split, for the controls.
        test: store of the test split.
        split: the images of the test split.
    """
    site = sae.about["site"]
    metrics = reconstruction_metrics(sae, site, train, test)
    mean = np.array(train.manifest["sites"][site]["mean"])
    metrics |= spliced_accuracy(sae, site, sae.about["tokens"], backbone, split, mean)
    write_json(work.out / "metrics.json", {**metrics, "record": record})
    say(", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))


@torch.no_grad()
def reconstruction_metrics(sae: SAE, site: str, train: ActivationStore, test: ActivationStore) -> dict[str, float]:
    """FVU, L0 and dead latents on test; the FVU of PCA with k components (fitted on train) as control.

    fvu = sum ||x - x_hat||^2 / sum ||x - mean of the split||^2; a latent is dead on a split on which it
    never fires.
    """
    rows = {"test": test.rows(site), "train": train.rows(site)}
    centre = {
        name: np.array(store.manifest["sites"][site]["mean"]) for name, store in (("test", test), ("train", train))
    }
    total, error, active = 0.0, 0.0, 0
    fires = {name: np.zeros(sae.d_sae, bool) for name in rows}
    scatter = np.zeros((sae.d_in, sae.d_in))
    for name, windows in ((name, one.windows(_ROWS)) for name, one in rows.items()):
        for x in (window.astype(np.float32) for window in windows):
            codes = sae.encode(x)
            fires[name] |= (codes.dense() > 0).any(dim=0).cpu().numpy()
            centred = x - centre[name]
            if name == "train":
                scatter += centred.T @ centred
            else:
                total += float(np.square(centred).sum())
                error += float(np.square(x - sae.decode(codes).cpu().numpy()).sum(dtype=np.float64))
                active += int(codes.l0().sum())
    components = np.linalg.eigh(scatter)[1][:, -sae.k :]
    pca_error = 0.0
    for x in rows["test"].windows(_ROWS):
        centred = x - centre["train"]
        pca_error += float(np.square(centred - centred @ components @ components.T).sum())
    return {
        "n": len(rows["test"]),
        "fvu": error / total,
        "fvu_pca_k": pca_error / total,
        "l0": active / len(rows["test"]),
        "dead_test": int((~fires["test"]).sum()),
        "dead_train": int((~fires["train"]).sum()),
    }


@torch.no_grad()
def spliced_accuracy(
    sae: SAE, site: str, tokens: str, backbone: Backbone, split: Split, mean: np.ndarray
) -> dict[str, float]:
    """Accuracy with the reconstruction put in place of the activation, on ``split``.

    Beside it the untouched model and, as the floor, the train mean in its place. Defined where a site is
    the residual stream (blocks.<i>.input, .output) and its tokens are cls, patches or all; elsewhere the
    result is empty.
    """
    block, part = sites.parse(site)
    if block is None or part not in ("input", "output") or tokens == "mean":
        return {}
    start = block + (part == "output")
    positions = {"cls": slice(0, 1), "patches": slice(backbone.n_prefix, None), "all": slice(None)}[tokens]
    floor = torch.from_numpy(mean.astype(np.float32)).to(backbone.device)

    def splice(x_BTD: Tensor, values: Tensor) -> Tensor:
        out = x_BTD.clone()
        out[:, positions] = values
        return out

    hits: dict[str, list[np.ndarray]] = {"untouched": [], "spliced": [], "mean": []}
    labels = iter(np.split(split.labels, range(_IMAGES, len(split), _IMAGES)))
    for pixels in split.batches(backbone.preprocess, _IMAGES, torch.get_num_threads()):
        x_BTD, _ = backbone.run_blocks(backbone.tokens(backbone.normalize(pixels)), 0, start)
        picked = x_BTD[:, positions]
        x_hat = sae(picked.reshape(-1, sae.d_in)).reshape(picked.shape)
        truth = next(labels)
        for name, x in (("untouched", x_BTD), ("spliced", splice(x_BTD, x_hat)), ("mean", splice(x_BTD, floor))):
            logits = backbone.classify(backbone.run_blocks(x, start, backbone.n_blocks)[0])
            hits[name].append(logits.argmax(dim=1).cpu().numpy() == truth)
    results = {name: np.concatenate(blocks) for name, blocks in hits.items()}
    spliced = wilson(results["spliced"])
    return {
        "accuracy_untouched": float(results["untouched"].mean()),
        "accuracy_spliced": spliced["accuracy"],
        "accuracy_spliced_lo": spliced["lo"],
        "accuracy_spliced_hi": spliced["hi"],
        "accuracy_mean_instead": float(results["mean"].mean()),
        **{f"spliced_{k}": v for k, v in paired(results["spliced"], results["untouched"]).items()},
    }
