"""Interchanges of one attribute between images: whether latents disentangle two attributes."""
