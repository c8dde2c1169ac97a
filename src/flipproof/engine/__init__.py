"""Long work: journal, executors, progress."""
