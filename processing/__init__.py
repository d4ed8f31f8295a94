"""The processor: images and chats to model inputs; uploaded as flat remote code."""
