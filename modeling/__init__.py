"""The model: compressors, routers and the language model around them; uploaded as flat remote code."""
