"""Token ids and texts that continue others: sampling, stop strings, constraints, chats."""
