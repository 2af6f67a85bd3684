"""What runs leave on disk: folders, logs, checkpoints, copies, and reading them back."""
