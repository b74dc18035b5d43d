"""Which tokens are edited: specs, the prompts and answers of a batch, token columns. Pure torch."""
