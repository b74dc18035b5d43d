"""What users call besides the model: the collator, marks of a chat template, pictures, interchange, hot swaps."""
