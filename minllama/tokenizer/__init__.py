"""Text to token ids and back, stored forms of tokenizers, chat templates."""
