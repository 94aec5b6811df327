"""Images whose labels are taken away, and an overlay of the pipeline for them."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparsight.images.manifest import Manifest


def unlabelled(manifest: Path, out: Path, *splits: str, share: float = 1.0) -> Manifest:
    """The manifest without the labels of the first ``share`` of each split's images; without any, it has no classes."""
    table = pq.read_table(manifest)
    of_split = np.array(table["split"].to_pylist())
    gone = np.zeros(len(table), bool)
    for split in splits:
        rows = np.flatnonzero(of_split == split)
        gone[rows[: round(share * len(rows))]] = True
    for name in ("label", "label_name"):
        values = [None if lost else value for lost, value in zip(gone, table[name].to_pylist(), strict=True)]
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))
    about = json.loads((table.schema.metadata or {})[b"sparsight"])
    about["classes"] = [] if gone.all() else about["classes"]
    pq.write_table(table.replace_schema_metadata({"sparsight": json.dumps(about)}), out)
    return Manifest(out)
