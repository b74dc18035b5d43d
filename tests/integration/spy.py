"""Record which tokens LoReFT edits, when layers ask for them."""

import torch

from peft_reft.tuner.forward import Forward


def expected_offsets(length, first=2, last=2):
    """Return the tokens that `f2+l2` edits in a prompt of `length` tokens, by the paper's rule for short prompts."""
    if length < first + last:
        first, last = length // 2, (length + 1) // 2
    return frozenset(range(first)) | frozenset(range(length - last, length))


class Spy:
    """Records which tokens of each row are edited.

    `rollout` (forwards without labels or gradients: `generate`), `train` (with gradients) and `scored` (with labels,
    without gradients) are sets of (tokens of the row's prompt, edited tokens, counted from the row's first real one).
    `rows` lists the whole rows of the forwards that edited.
    """

    def __init__(self, monkeypatch):
        self.rollout, self.train, self.scored, self.rows = set(), set(), set(), []
        self._inputs, self._known = None, {}
        index = Forward.index

        def spied(forward, *args):
            found = index(forward, *args)
            if (
                found is not None and self._inputs is not None and id(found) not in self._known
            ):  # layers share it, and so does recomputation
                self._known[id(found)] = found
                self._record(found)
            return found

        monkeypatch.setattr(Forward, "index", spied)

    def watch(self, peft_model):
        def note(model, args, kwargs):
            self._inputs = dict(kwargs) | ({"input_ids": args[0]} if args else {})

        base = peft_model.get_base_model()
        base.register_forward_pre_hook(note, with_kwargs=True, prepend=True)

    def _record(self, index):
        ids, mask, labels = (self._inputs.get(name) for name in ("input_ids", "attention_mask", "labels"))
        assert index.shape == tuple(ids.shape) == tuple(mask.shape), "tokens after the first forward of a rollout"
        flat = index.rows[index.valid.squeeze(-1) > 0].tolist()
        assert len(flat) == len(set(flat)), "a token was edited twice"
        grad = torch.is_grad_enabled()
        target = self.train if grad else self.rollout if labels is None else self.scored
        for row, (tokens, real) in enumerate(zip(ids, mask.bool())):
            columns = [at - row * ids.shape[1] for at in flat if at // ids.shape[1] == row]
            assert all(real[column] for column in columns), "padding was edited"
            rank = (real.cumsum(0) - 1).tolist()
            prompt = real if labels is None else real & (labels[row] == -100)
            self.rows.append(tuple(tokens[real].tolist()))
            target.add((tuple(tokens[prompt].tolist()), frozenset(rank[column] for column in columns)))

    def assert_prompts_edited(self, edits):
        """Assert that `f2+l2` was edited in each prompt, and that prompts of several lengths were seen."""
        assert edits and all(offsets == expected_offsets(len(prompt)) for prompt, offsets in edits)
        assert len({len(prompt) for prompt, _ in edits}) > 2


class Documents:
    """Records which tokens of which documents are edited, by forwards of whole rows, packed ones taken apart.

    `train` and `rest`, with gradients and without, are sets of (tokens of the document, edited ones, counted from its
    first). What the backbone is given is what is seen, so that callers of the backbone alone are seen, too.
    """

    def __init__(self, monkeypatch):
        self.train, self.rest = set(), set()
        self._inputs, self._known = None, {}
        index = Forward.index

        def spied(forward, *args):
            found = index(forward, *args)
            if found is not None and self._inputs is not None and id(found) not in self._known:
                self._known[id(found)] = found  # layers share it, and so does recomputation
                self._record(found)
            return found

        monkeypatch.setattr(Forward, "index", spied)

    def watch(self, peft_model):
        def note(backbone, args, kwargs):
            self._inputs = dict(kwargs) | ({"input_ids": args[0]} if args else {})

        peft_model.get_base_model().base_model.register_forward_pre_hook(note, with_kwargs=True, prepend=True)

    def _record(self, index):
        ids, mask, at = (self._inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        assert index.shape == tuple(ids.shape)
        edited = index.edited.view(ids.shape)
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        assert not (edited & ~real).any(), "padding was edited"
        for row in range(len(ids)):
            tokens, bits = ids[row][real[row]], edited[row][real[row]]
            packed = mask is None and at is not None
            begins = (at[row][real[row]] == 0).nonzero().flatten().tolist() if packed else [0]
            for start, stop in zip(begins, [*begins[1:], len(tokens)]):
                document = tuple(tokens[start:stop].tolist())
                found = frozenset(bits[start:stop].nonzero().flatten().tolist())
                (self.train if torch.is_grad_enabled() else self.rest).add((document, found))
