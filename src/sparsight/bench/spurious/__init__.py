"""Spurious features: accuracy in the worst group after ablating the latents that stand for the feature."""
