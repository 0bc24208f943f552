"""Text to token ids and back, the forms that tokenizers are stored in, chat templates."""
