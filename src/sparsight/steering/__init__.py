"""Edits of activations along SAE latents, and the controls they are compared with."""
