"""One stage a card: on a machine of several, each stage that computes on a GPU locks one that no other stage has.

Snakemake counts cards but does not say which one a job may use. A cluster does, so there its choice stands.
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
    """Wait for a free card and make it the only one that this process sees, until the process ends.

    Call before CUDA is initialised. ``CUDA_VISIBLE_DEVICES`` limits the choice. Inside a SLURM job, and where there
    is no card, nothing happens.
    """
    if "SLURM_JOB_ID" in os.environ:
        return
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = list(machine.cards()) if named is None else [name.strip() for name in named.split(",") if name.strip()]
    if not cards:
        return
    folder = Path(tempfile.gettempdir(), f"sparsight-cards-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    said = False
    while (card := _lock_one(folder, cards)) is None:
        if not said:
            log(f"every card ({', '.join(cards)}) is in use by another stage; waiting for one")
        said = True
        time.sleep(_SECONDS)
    os.environ["CUDA_VISIBLE_DEVICES"] = card


def _lock_one(folder: Path, cards: list[str]) -> str | None:
    for card in cards:
        # Never closed: the lock is held until the process ends, whatever ends it.
        descriptor = os.open(folder / card, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        return card
    return None
