"""The marks of a chat template, found by rendering it with made-up contents."""
