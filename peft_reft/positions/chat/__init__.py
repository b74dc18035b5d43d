"""The marks of a chat template, found by rendering it with made-up contents.

- `render`: chats with made-up contents, and where their contents stand in the rendered text and in its tokens.
- `template`: from these texts to the marks.
- `check`: whether the marks hold in random chats.
"""
