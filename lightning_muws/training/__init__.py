"""HOW a weight gets its structure: ADMM, retraining inside the structure, and the callback that says when."""
