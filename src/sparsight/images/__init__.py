"""Images: sources, the manifest that lists and splits them, and their conversion to pixels."""
