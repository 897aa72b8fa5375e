"""The report of a run, made from its results.json alone: schema, comparison, charts, pages."""
