"""Prompts of MLLM4Rec, in our own words: a role, the history, the candidates by letter.

The published system puts a role in front that fits the data set and mixes it with the instruction
("hybrid prompt"). `QUESTION` has both; the ablations leave one of them out.
"""

ROLES = {
    "beauty": "a person who shops for beauty products",
    "toys": "a parent or guardian who buys toys for a child",
    "games": "a gamer who chooses video games",
    "ml-100k": "a movie fan who chooses the next movie",
    "sample": "a viewer who chooses the next short video",
}
ROLE = "You are {role}. "
INSTRUCTION = """\
What you chose so far, the oldest first:
{history}
Your choice now is one of these:
{candidates}
Answer with the letter of your next choice only."""

# Without the role's part and without the words that say what the lists are.
BARE = "{history}\n\n{candidates}\n\nLetter:"
