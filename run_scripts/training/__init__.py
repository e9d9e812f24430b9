"""What the training scripts do after their flags are checked; these modules import the libraries that take seconds."""
