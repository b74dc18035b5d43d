"""What an edit is: the formulas, what they compute with, and the function that adds an edit to hidden states.

Nothing here knows of positions, of PEFT or of a model; of transformers only the table of activations is used.
"""
