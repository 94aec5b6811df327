"""The activation store: format on disk, reader, writer, and the extraction that fills it."""
