"""Side-by-side speed comparisons, run by hand; their results are read by nbs/results/00_speed.ipynb."""
