"""The pages of latents and images: what they show is gathered from the stores, and packed into the report."""
