"""What the scripts share: command line, run lifecycle, models, output, images. No file here is a command."""

from run_scripts.shared import interrupts, versions

interrupts.install()
versions.check_transformers()
