"""A Hub of our own on 127.0.0.1, for tests of uploads and downloads with the real clients."""
