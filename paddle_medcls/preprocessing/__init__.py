"""From pixels to the input of a network: resize, crop, augment, normalise; caches and batches."""
