"""One training loop for every stage: schedules, accumulation, checkpoints that resume to the bit."""
