"""The numbers of these settings, weights and devices against fair-esm's own."""
