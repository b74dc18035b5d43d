"""What an edit is: the formulas, the factors they compute with, and the function that adds edits to hidden states.

Nothing here knows positions, PEFT or a model. Only the table of activations comes from transformers.
"""
