"""What people see of the bucket on W&B: a run for every trial. The bucket never waits for it."""
