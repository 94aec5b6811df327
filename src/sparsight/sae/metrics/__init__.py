"""Metrics of SAEs on stored activations, by subject. docs/evaluation.md has every formula."""
