"""The parts of train.py: options, data, model, checkpoints and what is reported."""
