"""Where in images features fire: scored against masks of the images."""
