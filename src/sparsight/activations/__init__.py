"""The activation store: its format on disk, its reader and writer, and the extraction that fills it."""
