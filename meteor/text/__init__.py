"""Conversations and prompt templates, and their token ids and labels."""
