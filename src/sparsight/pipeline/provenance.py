"""Provenance of the results of a run."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparsight.common import machine
from sparsight.common.digests import file_digest
from sparsight.common.files import write_json


def write_provenance(configuration: Path, benchmarks: Path, path: Path) -> None:
    """Write ``provenance.json``: time, git commit, versions, machine, and the cost of every job.

    Args:
        configuration: configuration.json, which lies beside; its digest ties the two together.
        benchmarks: folder of Snakemake's benchmark files, ``<job>.jsonl``.
        path: the file to write.
    """
    provenance = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "versions": machine.versions(),
        "machine": machine.describe(),
        "configuration_digest": file_digest(configuration),
        "jobs": {
            file.relative_to(benchmarks).with_suffix("").as_posix(): _cost(file)
            for file in sorted(benchmarks.rglob("*.jsonl"))
        },
    }
    write_json(path, provenance)


def _cost(benchmark: Path) -> dict[str, Any]:
    """Wall time, processor time and peak memory of a job's last attempt; None if it was too short to be measured."""
    record = json.loads(benchmark.read_text())
    names = {"seconds": "s", "cpu_seconds": "cpu_time", "peak_memory_mb": "max_rss"}
    return {name: record[key] if isinstance(record[key], int | float) else None for name, key in names.items()}
