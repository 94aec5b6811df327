"""Weights in the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import hf_hub_download

from sparsight.common.errors import SparsightError, reason
from sparsight.common.progress import log


def fetch(repository: str, file: str, beside: tuple[str, ...]) -> Path:
    """The local copy of a file, downloaded unless the cache of huggingface_hub has it, with one of ``beside``.

    Args:
        repository: ``<owner>/<name>``.
        file: its path in the repository.
        beside: names of files in its folder, of which the first that is there is also fetched.

    Raises:
        SparsightError: no such repository or file, or no network.
    """
    path = _download(repository, file)
    for number, name in enumerate(beside, 1):
        try:
            _download(repository, str(Path(file).with_name(name)))
            break
        except SparsightError:
            if number == len(beside):
                raise
    return path


def _download(repository: str, file: str) -> Path:
    log(f"hf:{repository}/{file}: from the cache of huggingface_hub, or downloaded")
    try:
        return Path(hf_hub_download(repository, file))
    except (OSError, ValueError) as error:  # the package's own errors are among these
        raise SparsightError(
            f"weights: hf:{repository}/{file} is not cached and could not be downloaded ({reason(error)}); check the "
            "name and the network, or download the folder elsewhere and give its path"
        ) from None
