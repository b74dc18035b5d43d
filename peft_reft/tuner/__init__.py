"""Puts LoReFT into a model: hooks, what the layers of one forward share."""
