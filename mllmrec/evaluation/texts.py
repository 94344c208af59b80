"""Texts that repeat themselves."""

WORDS = 4  # length of the word sequences whose repetition counts
LOOPS = 0.5  # a text loops if more of its sequences occurred before in it


def repeated_share(text: str) -> float:
    """Share of the word sequences of length WORDS that occurred before in the text; 0 to 1."""
    words = text.split()
    sequences = [tuple(words[n : n + WORDS]) for n in range(len(words) - WORDS + 1)]
    return 1 - len(set(sequences)) / len(sequences) if sequences else 0.0


def loops(text: str) -> bool:
    """Whether the text repeats itself, as small models do."""
    return repeated_share(text) > LOOPS
