"""Images whose labels are taken away, and an overlay of the pipeline for them."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparsight.images.manifest import Manifest


def unlabelled(manifest: Path, out: Path, *splits: str, share: float = 1.0) -> Manifest:
    """The manifest without the labels of the first ``share`` of each split's images; without any, it has no classes."""
    file = pq.ParquetFile(manifest)
    of_split = np.array(file.read(["split"])["split"].to_pylist())
    gone = np.zeros(len(of_split), bool)
    for split in splits:
        rows = np.flatnonzero(of_split == split)
        gone[rows[: round(share * len(rows))]] = True
    about = json.loads(file.schema_arrow.metadata[b"sparsight"])
    about["classes"] = [] if gone.all() else about["classes"]
    schema = file.schema_arrow.with_metadata({"sparsight": json.dumps(about)})
    with pq.ParquetWriter(out, schema) as writer:
        for group in range(file.num_row_groups):  # they may say which rows are of one split
            table = file.read_row_group(group)
            lost, gone = gone[: len(table)], gone[len(table) :]
            for name in ("label", "label_name"):
                at = table.schema.get_field_index(name)
                values = [None if none else v for none, v in zip(lost, table[name].to_pylist(), strict=True)]
                table = table.set_column(at, schema.field(at), pa.array(values, schema.field(at).type))
            writer.write_table(table.replace_schema_metadata(schema.metadata))
    return Manifest(out)
