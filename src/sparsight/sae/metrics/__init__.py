"""What SAEs are worth on stored activations, by subject: docs/evaluation.md has every formula."""
