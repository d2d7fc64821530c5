"""Conversations, prompt templates, and the token ids and labels they become."""
