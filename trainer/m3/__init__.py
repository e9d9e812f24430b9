"""Training of a LLaVA at several numbers of visual tokens (M3)."""
