"""Code that knows all stages: the whole configuration, how a stage runs, its record, and which stages are stale."""
