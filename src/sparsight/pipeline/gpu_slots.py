"""One stage per GPU: on a machine with several, each stage that needs one locks a GPU that no other stage uses.

Snakemake counts GPUs but does not say which one a job may use. A cluster does: a single card is taken as given. Several
cards of one SLURM job are handed out to the stages that run beside each other in it.
"""

import fcntl
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from sparsight.common import machine
from sparsight.common.progress import log

_SECONDS = 1.0


def take_card() -> None:
    """Wait for a free GPU and make it the only one visible to this process, until the process ends.

    Call before CUDA is initialised. ``CUDA_VISIBLE_DEVICES`` limits the choice. Nothing happens without a GPU, or
    inside a SLURM job that has not set this variable to several cards.
    """
    visible, job = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("SLURM_JOB_ID")
    cards = _usable(visible, list(machine.cards()))
    if not cards or (job is not None and (visible is None or len(cards) == 1)):
        return
    folder = Path(tempfile.gettempdir(), f"sparsight-cards-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    logged = False
    if job is not None:  # only its own stages can meet on the cards of a job, whose numbers may be its own, too
        cards = {name: f"{job}-{key}" for name, key in cards.items()}
    while (card := _lock_one(folder, cards)) is None:
        if not logged:
            log(f"every card ({', '.join(cards)}) is in use by another stage; waiting for one")
        logged = True
        time.sleep(_SECONDS)
    os.environ["CUDA_VISIBLE_DEVICES"] = card


def _usable(visible: str | None, uuids: list[str]) -> dict[str, str]:
    """The name of each usable card, as CUDA takes it, and the key of its lock.

    The key is the card's UUID, whether the card is named by its number or its UUID, or the start of that. A number that
    nvidia-smi does not list, and a part of a card (MIG), is its own key. Numbers are those of nvidia-smi. CUDA may
    count unlike cards in another order, unless ``CUDA_DEVICE_ORDER`` is ``PCI_BUS_ID``.

    Args:
        visible: ``CUDA_VISIBLE_DEVICES``; CUDA ignores what follows the first negative number.
        uuids: of the cards that nvidia-smi lists.
    """
    if visible is None:
        return {uuid: uuid for uuid in uuids}
    usable: dict[str, str] = {}
    for name in map(str.strip, visible.split(",")):
        if name.startswith("-"):
            break
        if name:
            matching = uuids[int(name) :][:1] if name.isdecimal() else [uuid for uuid in uuids if uuid.startswith(name)]
            usable[name] = matching[0] if len(matching) == 1 else name
    return usable


def _lock_one(folder: Path, cards: Mapping[str, str]) -> str | None:
    for card, key in cards.items():
        # Never closed, so the lock is held until the process ends for any reason.
        descriptor = os.open(folder / key.replace("/", "-"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        return card
    return None
