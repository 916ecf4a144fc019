"""What the training recipes reach on real images, beside raw pixels, the untrained network and other libraries. Writes
docs/results.md."""
