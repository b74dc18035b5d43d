"""`peft-reft`, the command: train, generate, chat, inspect, show-positions, convert, export."""
