"""Pre-training every size as a masked autoencoder (SMAE)."""
