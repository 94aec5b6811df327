"""The loop that trains backbones, SAEs and head policies, and the batches that it reads."""
