"""Dynamic attention-head pruning: the policy, its training, and what steering does to it."""
