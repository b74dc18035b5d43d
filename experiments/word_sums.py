"""Two-step sums told in words, with a line of reasoning and an answer: rows that a seed makes, as many as wanted.

    python experiments/word_sums.py            # prints a few

A model of 135M parameters can learn them, where it solves nothing of GSM8K. Numbers are words in the question and
digits in the answer, so no part of the answer can be copied. No three numbers of the rows to train on are those of a
row to test on, however many there are of either: `is_test` divides them.
"""

import random

Example = dict[str, str]  # prompt, completion, answer

TEMPLATE = "{}\n"
SMALLEST, LARGEST = 2, 20
"""Of the numbers in a question."""
TO_TEN = "zero one two three four five six seven eight nine ten"
TO_TWENTY = "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"
WORDS = [*TO_TEN.split(), *TO_TWENTY.split()]
NAMES = ["Tom", "Anna", "Ben", "Mia", "Sam", "Lucy", "Max", "Emma"]
THINGS = ["apples", "books", "coins", "cards", "pens", "shells", "stamps", "marbles"]
GAINS = ["{who} finds {n} more.", "A friend gives {who} {n} more.", "{who} buys {n} more."]
LOSSES = ["{who} loses {n} of them.", "{who} gives {n} of them away.", "{who} sells {n} of them."]


def rows(count: int, seed: int, test: bool = False) -> list[Example]:
    """Make rows to train on, or to test on.

    Args:
        count: how many.
        seed: the same seed makes the same rows, and more of them begin with the same.
        test: whether to take the fifth of all questions that no row to train on has.
    """
    source = random.Random(seed)
    found: list[Example] = []
    while len(found) < count:
        a, b, c = (source.randint(SMALLEST, LARGEST) for _ in range(3))
        gains = [source.random() < 0.5, source.random() < 0.5]
        told = [source.choice(GAINS if gain else LOSSES) for gain in gains]
        who, things = source.choice(NAMES), source.choice(THINGS)
        middle = a + b if gains[0] else a - b
        end = middle + c if gains[1] else middle - c
        if min(middle, end) < 0 or is_test(a, b, c) is not test:
            continue
        steps = [story.format(who=who, n=WORDS[n]) for story, n in zip(told, (b, c))]
        question = f"{who} has {WORDS[a]} {things}. {' '.join(steps)} How many {things} does {who} have now?"
        signs = ["+" if gain else "-" for gain in gains]
        reasoning = f"{a} {signs[0]} {b} = {middle}, {middle} {signs[1]} {c} = {end}"
        found.append({"prompt": question, "completion": f"{reasoning}\nThe answer is {end}", "answer": str(end)})
    return found


def is_test(a: int, b: int, c: int) -> bool:
    """Whether questions with these three numbers, in this order, are for tests: about a fifth of them."""
    return (a * 7919 + b * 104729 + c * 1299709) % 1009 < 202


if __name__ == "__main__":
    for example in rows(3, seed=0) + rows(2, seed=0, test=True):
        print(f"{example['prompt']}\n{example['completion']}\n")
