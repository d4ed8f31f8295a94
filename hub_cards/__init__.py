"""Model cards, uploads and demos for the Hugging Face Hub."""
