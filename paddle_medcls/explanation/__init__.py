"""Grad-CAM and its faithfulness."""
