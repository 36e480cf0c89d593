"""The report of a study: one page, one CSV file, figures and a table for the terminal, over whatever has finished."""
