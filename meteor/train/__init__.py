"""Training: what is frozen, the schedule, the engine, the one loop, and what a finished stage leaves behind."""
