"""What knows all stages: the whole configuration, how a stage runs, its record, and what must be made again."""
