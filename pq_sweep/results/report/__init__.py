"""Reports on sweeps: a page to look at, and figures and tables for a paper: `python -m pq_sweep.report FOLDER...`."""
