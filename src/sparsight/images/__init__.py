"""Images: where they come from, how they are listed and split, how they become pixels."""
