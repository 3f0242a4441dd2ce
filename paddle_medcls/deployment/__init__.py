"""Trained models in use: predictor, inference backends, export."""
