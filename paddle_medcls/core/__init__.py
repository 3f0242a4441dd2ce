"""Errors, files, progress, hardware, and the only imports of Paddle and OpenVINO."""
