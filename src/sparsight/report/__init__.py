"""One offline HTML page per run."""
