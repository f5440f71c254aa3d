"""What people see of the bucket on W&B, and what W&B's sweeps suggest. The bucket never waits."""
