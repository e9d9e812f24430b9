"""What the scripts share, and no command: command line, run lifecycle, models, output, pictures."""
