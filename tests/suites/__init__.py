"""Hugging Face's own model and processor tests, run on our classes and on stock LLaVA."""
