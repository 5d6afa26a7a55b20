"""A sweep as a page to look at, figures for a paper, and tables: `python -m pq_sweep.report FOLDER...`."""
