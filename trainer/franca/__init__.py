"""Training nested clustering of images (Franca), and evaluating it."""
