"""The chapters of the page: numbers read from the run's files, and figures."""
