"""Does per-image routing pay? A controlled study on small models: `python -m adaptive_llava.training.study`."""
