"""Which tokens are edited. Index arithmetic on tensors, and plain Python; no model, no trainer.

A *document* is a text of prompts and answers; a row of a batch holds one, or several that are packed. A *turn* is a
prompt and the answer behind it. A *column* counts the entries of a row from 0, padding included; an *index* counts the
tokens of a document from 0; a *rank* counts the real tokens of a row from 1. A *slot* is an entry of
`intervention_positions`: a column, or -1.

============== =====================================================================================
module         its one job
============== =====================================================================================
`groups`       one class for each position group (``f``, ``l``, ``p``, ``g``)
`spec`         the grammar: a text such as ``f7+l7`` becomes `Positions`
`layout`       how slots are laid out
`layers`       the grammar of layers: ``"0-7;16;-1"``
`marks`        the headers of a chat template, and where they stand in a batch
`chat`         find the headers of a tokenizer's chat template
`turns`        prompts and answers of one document, in plain Python (for serving)
`batch`        read the batches of any trainer
`resolve`      prompts and answers of a batch; from these to slots
`scans`        running maximum and search, which ONNX lacks
`wanted`       what a layer asks
`sources`      the position source of a forward of whole rows
`checks`       what is wrong with such a batch
`generation`   the position source of a step of `generate`
`cached`       the position source of a forward behind a filled cache
`memory`       what a cache holds
`rollouts`     prompts of rollouts, checked against the forward that trains on them
`index`        from slots to the rows of hidden states that one layer edits
============== =====================================================================================
"""
