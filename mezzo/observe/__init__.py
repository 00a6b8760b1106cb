"""L4: what a run's sites lose and what goes wrong in it, written into its run directory."""
