"""The CPU operators of the oneDNN library inside Paddle's wheel."""
