"""One stage per GPU: on a machine with several, each stage that needs one locks a GPU that no other stage uses.

Snakemake counts GPUs but does not say which one a job may use. A cluster does, so its choice is kept there.
"""

import fcntl
import os
import tempfile
import time
from pathlib import Path

from sparsight.common import machine
from sparsight.common.progress import log

_SECONDS = 1.0


def take_card() -> None:
    """Wait for a free GPU and make it the only one visible to this process, until the process ends.

    Call before CUDA is initialised. ``CUDA_VISIBLE_DEVICES`` limits the choice. Nothing happens inside a SLURM job or
    without a GPU.
    """
    if "SLURM_JOB_ID" in os.environ:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = list(machine.cards()) if visible is None else [name.strip() for name in visible.split(",") if name.strip()]
    if not cards:
        return
    folder = Path(tempfile.gettempdir(), f"sparsight-cards-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    logged = False
    while (card := _lock_one(folder, cards)) is None:
        if not logged:
            log(f"every card ({', '.join(cards)}) is in use by another stage; waiting for one")
        logged = True
        time.sleep(_SECONDS)
    os.environ["CUDA_VISIBLE_DEVICES"] = card


def _lock_one(folder: Path, cards: list[str]) -> str | None:
    for card in cards:
        # Never closed, so the lock is held until the process ends for any reason.
        descriptor = os.open(folder / card, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        return card
    return None
