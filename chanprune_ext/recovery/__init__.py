"""Training a pruned network back to accuracy, and measuring what it reached."""
