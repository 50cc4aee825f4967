"""Export to other runtimes, and the verification that each file equals the model."""
