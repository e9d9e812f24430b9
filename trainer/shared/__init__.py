"""What all trainings use: base arguments, tables, sampling, checkpoints, callbacks, the Hub."""
