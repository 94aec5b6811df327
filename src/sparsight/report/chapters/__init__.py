"""What each chapter of the page says: numbers read from the run's files, and the chapter's figures."""
