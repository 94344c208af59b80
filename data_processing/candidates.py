"""A user's candidate list, and scoring it by popularity: shared by the sample, the data sets and the baselines."""

from collections import Counter


def candidates(user):
    """[(item_id, label)] of one row of users.jsonl: the target first, then the negatives."""
    return [(user["target"], 1), *((item_id, 0) for item_id in user["negatives"])]


def score_row(user_id, item_id, label, score, yes_logit=None, no_logit=None):
    """One line of scores.jsonl; rules without a language model have no logits."""
    return {"user_id": user_id, "item_id": item_id, "label": label, "yes_logit": yes_logit, "no_logit": no_logit, "score": score}


def popularity(users):
    """Counter item_id -> interactions that a recommender may know: all histories, and the targets of training users."""
    counts = Counter()
    for user in users:
        counts.update(user["history"])
        if user["split"] == "train":
            counts[user["target"]] += 1
    return counts


def popularity_scores(users, split="test"):
    """Lines of scores.jsonl for the users of `split`: a candidate's score is its popularity."""
    counts = popularity(users)
    return [
        score_row(user["user_id"], item_id, label, float(counts[item_id]))
        for user in users
        if user["split"] == split
        for item_id, label in candidates(user)
    ]
