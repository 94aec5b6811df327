"""What the latents of an SAE are worth in use: one folder per question, each answered beside controls."""
