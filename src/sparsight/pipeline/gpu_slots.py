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
from sparsight.common.errors import SparsightError
from sparsight.common.progress import log

_SECONDS = 1.0


def take_cards(n: int = 1) -> list[str]:
    """Wait for free GPUs and make them the only ones visible to this process, until the process ends.

    Call before CUDA is initialised. ``CUDA_VISIBLE_DEVICES`` limits the choice. Nothing happens without a GPU, or
    inside a SLURM job that has not set this variable to more than ``n`` cards.

    Returns:
        the names of the cards, as CUDA takes them; none without a GPU.

    Raises:
        SparsightError: there are fewer than ``n`` cards.
    """
    visible, job = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("SLURM_JOB_ID")
    cards = _usable(visible, list(machine.cards()))
    if not cards:
        return []
    if len(cards) < n:
        raise SparsightError(
            f"processes: {n} processes need as many cards, there are {len(cards)}; set processes lower"
        )
    if job is not None and (visible is None or len(cards) == n):
        return list(cards)[:n]
    folder = Path(tempfile.gettempdir(), f"sparsight-cards-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    logged = False
    if job is not None:  # only its own stages can meet on the cards of a job, whose numbers may be its own, too
        cards = {name: f"{job}-{key}" for name, key in cards.items()}
    while len(taken := _lock(folder, cards, n)) < n:
        if not logged:
            names = ", ".join(cards)
            one = f"every card ({names}) is in use by another stage; waiting for one"
            log(one if n == 1 else f"fewer than {n} of the cards ({names}) are free; waiting for {n}")
        logged = True
        time.sleep(_SECONDS)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(taken)
    return taken


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


def _lock(folder: Path, cards: Mapping[str, str], n: int) -> list[str]:
    """Lock ``n`` free cards and return their names, or lock none.

    One stage chooses at a time: two that each hold some cards and lack others would wait for each other.
    """
    taken: dict[str, int] = {}
    with (folder / "choosing").open("w") as choosing:
        fcntl.flock(choosing, fcntl.LOCK_EX)
        for card, key in cards.items():
            # Not closed if enough are free, so the lock is held until the process ends for any reason.
            descriptor = os.open(folder / key.replace("/", "-"), os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                continue
            taken[card] = descriptor
            if len(taken) == n:
                return list(taken)
        for descriptor in taken.values():
            os.close(descriptor)
    return []
