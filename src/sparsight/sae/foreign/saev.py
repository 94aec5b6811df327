"""Checkpoints of saev: a line of JSON, then the state_dict as ``torch.save`` writes it.

h = x W_enc + b_enc (x - b_dec in old files),  z = activation(h),  x_hat = z W_dec + b_dec, all as (d_in, d_sae).

The format's traps:

- The header says how old the file is. Without ``schema`` (saev 0.1.0) and with schema 1, the encoder subtracts b_dec.
  From schema 3 on it does not. Schema 2 was written by both; it is read as saev now does, without.
- ``top-k`` keeps the k largest h even if they are negative. Ours keeps positive ones only. The import counts rows for
  which this differs.
- ``batch-top-k`` keeps h above one threshold; a threshold of 0 or less is a ReLU.
- saev 0.1.0 by default trains on (x - mean) / (mean ||x - mean|| / sqrt(d_in)). The file does not hold these numbers.
  The setting ``normalized`` takes them from the train split.
- The file names no layer.
"""

import io
import json
from pathlib import Path
from typing import Any

from sparsight.backbones.weights import read_weights
from sparsight.common.errors import SparsightError
from sparsight.sae.foreign.source import Foreign, build, expect
from sparsight.sae.saelens import subtract_b_dec_first

_SUBTRACTS = (None, 1)
_SCHEMAS = (None, 1, 2, 3, 4, 5)
_NAMES = {"W_enc", "b_enc", "W_dec", "b_dec"}


def load(path: Path) -> Foreign:
    """The SAE of a saev checkpoint.

    Raises:
        SparsightError: another kind of file, a schema or an activation that is not known.
    """
    with path.open("rb") as file:
        line, rest = file.readline(), file.read()
    try:
        header: Any = json.loads(line)
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise SparsightError(f"{path}: not a checkpoint of saev, which begins with a line of JSON; check format")
    schema = header.get("schema")
    if schema not in _SCHEMAS:
        raise SparsightError(f"{path}: saev's schema {schema!r} is not known; known: none and 1 to {_SCHEMAS[-1]}")
    activation, k = _activation(path, header)
    weights = read_weights(path, io.BytesIO(rest))
    threshold = {"activation.threshold"} if activation == "BatchTopK" else set()
    expect(path, f"saev {schema or '0.1.0'}, {activation}", weights, _NAMES | threshold)
    if activation == "BatchTopK":
        weights["threshold"] = weights.pop("activation.threshold").clamp(min=0)
    if schema not in _SUBTRACTS:  # ours does
        subtract_b_dec_first(weights)
    return Foreign(build(path, activation.lower(), k, weights), signed=activation == "TopK")


def _activation(path: Path, header: dict[str, Any]) -> tuple[str, int | None]:
    """Name of the activation's class, and k."""
    if "schema" not in header:
        if "d_vit" not in header:
            raise SparsightError(f"{path}: the header has neither schema nor d_vit, so it is not saev's; check format")
        return "Relu", None
    config = header.get("cfg", {})
    if header["schema"] == 1 and header.get("cls") in ("Relu", "TopK", "BatchTopK"):  # the first form of schema 1
        name, settings = header["cls"], config
    else:
        about = config.get("activation", {})
        name, settings = about.get("cls"), about.get("params", {})
    if name not in ("Relu", "TopK", "BatchTopK"):
        raise SparsightError(f"{path}: saev's activation {name!r} is not known; known: Relu, TopK, BatchTopK")
    return name, None if name == "Relu" else int(settings.get("top_k", 32))
