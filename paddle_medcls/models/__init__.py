"""Networks, weight files and their sidecars."""
