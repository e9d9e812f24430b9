"""Pre-training of every size as a masked autoencoder (SMAE)."""
