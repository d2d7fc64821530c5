"""Jobs on a cluster: run files in jobs/runs/, resources of each stage, submission and checks before a run."""
