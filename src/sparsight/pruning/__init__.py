"""Dynamic attention-head pruning: the policy, its training, and the effect of steering on it."""
