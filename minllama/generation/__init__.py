"""Continue token ids and texts: sampling, stop strings, constraints, chats."""
