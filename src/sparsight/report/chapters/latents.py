"""Content of the latent browser: for each SAE its latents, and the test images that activate them most.

Shapes: B images at a time, N test images, P patches, F latents (d_sae).
"""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparsight.activations.store import ActivationStore
from sparsight.common import tables
from sparsight.common.slices import row_slices
from sparsight.images.manifest import Manifest
from sparsight.images.split import Split
from sparsight.sae.base import SAE, load
from sparsight.sae.inputs import SaeInputs
from sparsight.sae.resae import ReSAE

_SIDE = 56  # pixels of a thumbnail
_BYTES = 9_000_000  # space for thumbnails and heat maps; the page stays under 15 MB
_ENTRIES = 2**25  # largest number of entries of dense codes at a time


class Browser:
    """Collects the data for the page. Every image is stored once, however many latents show it.

    Args:
        manifest: the images of the run.
        n_latents: latents per SAE, those of the highest class selectivity, without labels of the highest
            monosemanticity.
        n_images: images per latent.
    """

    def __init__(self, manifest: Manifest, n_latents: int, n_images: int) -> None:
        self.split, self.classes = manifest.split("test"), manifest.classes
        self.n_latents, self.n_images = n_latents, n_images
        self.saes: dict[str, Any] = {}
        self.judged = False
        """Whether latents have a class."""
        self._place: dict[int, int] = {}
        self._thumbnails: list[bytes] = []
        self._bytes = 0

    def add(
        self, name: str, folder: Path, chain: ReSAE | None, store: ActivationStore, device: torch.device, share: float
    ) -> None:
        """Add one SAE.

        Args:
            name: name of the SAE on the page.
            folder: folder with its files.
            chain: the chain that it belongs to, if any.
            store: activations of the test split.
            device: device for computing codes.
            share: share of the space for images after which no more latents are added.
        """
        sae = load(folder).to(device)
        rows = tables.read(folder / "latents.parquet")
        inputs = SaeInputs(store, sae.about["site"], device, chain, sae.about["tokens"])
        values_FK, images_FK = top_images(sae, inputs, len(self.split), self.n_images)
        limit, shown = self._bytes + share * _BYTES, []
        self.judged = rows[0]["best_class"] is not None
        score = "selectivity" if self.judged else "monosemanticity"
        fires = [row for row in rows if row["frequency"] > 0 and not np.isnan(row[score])]
        # A latent that fires on an image or two scores high by chance. Those come last.
        rare = (values_FK > 0).sum(axis=1) < self.n_images
        fires.sort(key=lambda row: (rare[row["latent"]], -row[score], row["latent"]))
        for row in fires[: self.n_latents]:
            if self._bytes > limit:
                break
            active = values_FK[row["latent"]] > 0
            images = images_FK[row["latent"]][active]
            heats = _heats(sae, inputs, images, row["latent"])
            self._bytes += sum(4 * len(heat) for heat in heats if heat)  # up to three digits and a comma each
            top = [
                {"image": self._placed(int(image)), "activation": round(float(value), 4), "heat": heat}
                for image, value, heat in zip(images, values_FK[row["latent"]][active], heats, strict=True)
            ]
            shown.append({**_facts(row), "top": top})
        self.saes[name] = {"site": sae.about["site"], "latents": shown, "total": len(rows)}

    def data(self) -> dict[str, Any]:
        """The content of the page's JSON."""
        return {
            "classes": self.classes,
            "judged": self.judged,
            "shown": self.n_images,
            "saes": self.saes,
            "images": [uri.decode() for uri in self._thumbnails],
            "labels": self.split.labels[list(self._place)].tolist(),
        }

    def _placed(self, image: int) -> int:
        """Index of the image in the page's list, to which it is added if missing."""
        if image not in self._place:
            self._place[image] = len(self._thumbnails)
            self._thumbnails.append(thumbnail(self.split, image))
            self._bytes += len(self._thumbnails[-1])
        return self._place[image]


def _facts(row: dict[str, Any]) -> dict[str, Any]:
    """A latent's row of ``latents.parquet``, rounded, under the names that the page's script reads."""
    scores = {"precision": "class_precision", "selectivity": "selectivity", "monosemanticity": "monosemanticity"}
    return {
        "latent": row["latent"],
        "class": row["best_class"],
        **{name: _rounded(row[column]) for name, column in scores.items()},
        "frequency": round(row["frequency"], 6),
        "max": round(row["max_activation"], 4),
        "nearest": row["nearest"],
        "nearest_cosine": round(row["nearest_cosine"], 4),
        "histogram": row["histogram"],
    }


def _rounded(score: float | None) -> float | None:
    return None if score is None or np.isnan(score) else round(score, 4)


@torch.no_grad()
def top_images(one: SAE, seen: SaeInputs, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k images with the largest activation of each latent, largest first: values and image numbers, (F, k).

    An image's activation is the largest over its tokens. Among equal activations the earlier image comes first.
    """
    values = np.zeros((one.d_sae, 0), np.float32)
    images = np.zeros((one.d_sae, 0), np.int64)
    for window in row_slices(n, max(1, _ENTRIES // (one.d_sae * seen.tokens))):
        per_image_FB = _codes(one, seen, window).amax(dim=1).T.cpu().numpy()
        numbers = np.broadcast_to(np.arange(window.start, window.stop), per_image_FB.shape)
        both, all_numbers = np.hstack([values, per_image_FB]), np.hstack([images, numbers])
        order = np.argsort(-both, axis=1, kind="stable")[:, :k]
        values, images = np.take_along_axis(both, order, axis=1), np.take_along_axis(all_numbers, order, axis=1)
    return values, images


def _codes(one: SAE, seen: SaeInputs, images: slice) -> Tensor:
    """Codes of every token of some images that the SAE reads, (B, T, F)."""
    return one.encode(seen.images(images)).dense().unflatten(0, (-1, seen.tokens))


@torch.no_grad()
def _heats(one: SAE, seen: SaeInputs, images: np.ndarray, latent: int) -> list[list[int] | None]:
    """For each image, the latent's activation on every patch, from 0 to 255; None if there is no square of patches."""
    patches = seen.groups.get("patches", [])
    if not patches or len(patches) != round(len(patches) ** 0.5) ** 2:
        return [None] * len(images)
    heats: list[list[int] | None] = []
    for image in images.tolist():
        codes_P = _codes(one, seen, slice(image, image + 1))[0, patches, latent]
        scaled = 255 * codes_P / codes_P.max().clamp(min=1e-12)
        heats.append([round(value) for value in scaled.tolist()])
    return heats


def thumbnail(split: Split, row: int) -> bytes:
    """The image as a data URI, at most _SIDE pixels a side. Smaller pictures keep their size."""
    picture = split.picture(row)
    image = Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
    small = max(image.size) <= _SIDE
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    if small:
        image.save(buffer, format="PNG")
    else:
        image.save(buffer, format="JPEG", quality=80)
    kind = b"png" if small else b"jpeg"
    return b"data:image/" + kind + b";base64," + base64.b64encode(buffer.getvalue())
