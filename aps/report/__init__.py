"""The report of a study, from all runs that have finished: a page, a CSV file, figures and a table for the terminal."""
