"""Errors, files, progress, hardware, and the only import of Paddle."""
