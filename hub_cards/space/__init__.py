"""The demo Space: chat with images, and see what each visual token stands for and what it saves."""
