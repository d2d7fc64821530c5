"""What to run where: run files in jobs/runs/."""
