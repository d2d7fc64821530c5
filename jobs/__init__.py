"""What to run where: run files in jobs/runs/, what each stage's job needs, and how jobs are submitted."""
