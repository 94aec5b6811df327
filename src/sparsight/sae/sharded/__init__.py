"""One SAE over several processes, split over its latents (docs/sae.md)."""
