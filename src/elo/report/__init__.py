"""One schema for the results of runs and comparisons, and one report of both."""
