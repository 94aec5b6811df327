"""The activation store by its public name: ``python -m sparsight.store verify|info PATH``."""

from sparsight.activations.command import main
from sparsight.activations.store import ActivationStore, Rows, verify

__all__ = ["ActivationStore", "Rows", "main", "verify"]

if __name__ == "__main__":
    main()
