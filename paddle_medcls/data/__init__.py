"""What the images and labels are: files, pixels, indexes, splits, archives and the data sets themselves."""
